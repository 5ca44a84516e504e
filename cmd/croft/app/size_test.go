package app

import (
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]uint64{
		"64Mi":    64 << 20,
		"10Gi":    10 << 30,
		"1T":      1_000_000_000_000,
		"1.5Gi":   3 << 29,
		"1Mi":     1 << 20,
		"1048576": 1 << 20,
		"1e9":     1_000_000_000,
		"4Ei":     1 << 62,
		"+1Gi":    1 << 30,
		"10M":     10_000_000,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", s, got, err, want)
		}
	}
	for s, want := range map[string]string{
		"":                       "write it as",
		"lots":                   "write it as",
		"10GB":                   "did you mean 10Gi?",
		"10GiB":                  "did you mean 10Gi?",
		"10g":                    "did you mean 10Gi?",
		"10 Gi":                  "did you mean 10Gi?",
		"10gib":                  "did you mean 10Gi?",
		"1.5kb":                  "did you mean 1.5Ki?",
		"-1Gi":                   "negative",
		"-0.5":                   "negative",
		"0":                      "at least 1Mi",
		"0Gi":                    "at least 1Mi",
		"10":                     "did you mean 10Gi?",
		"1048575":                "did you mean 1048575Gi?",
		"1.5":                    "did you mean 1.5Gi?",
		"64Ki":                   "at least 1Mi",
		"10m":                    "did you mean 10Mi?",
		"1048576.5":              "whole number of bytes",
		"5Ei":                    "at most 4Ei",
		"4611686018427387905":    "at most 4Ei",
		"99999999999999999999Gi": "at most 4Ei",
		"1e30":                   "at most 4Ei",
		"NaN":                    "write it as",
		"0x10":                   "write it as",
		"1Gi1":                   "write it as",
	} {
		if got, err := parseSize(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %d, %v; want %q", s, got, err, want)
		}
	}
}

func TestParseInodes(t *testing.T) {
	if n, err := parseInodes("50000"); n != 50000 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	for _, s := range []string{"", "0", "-1", "1.5", "10k", "99999999999999999999"} {
		if n, err := parseInodes(s); err == nil {
			t.Errorf("%q is %d", s, n)
		}
	}
}

func TestHuman(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0", 1023: "1023", 1024: "1Ki", 1536: "1.5Ki", 10 << 30: "10Gi", 3 << 29: "1.5Gi",
		1<<20 - 1: "1Mi", 1023 << 10: "1023Ki", 5<<30 + 1: "5Gi", 1 << 62: "4Ei", 1<<64 - 1: "16Ei",
	} {
		if got := human(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestPercent(t *testing.T) {
	for _, test := range []struct {
		used, limit uint64
		want        string
	}{{0, 0, "-"}, {0, 10, "0%"}, {1, 1000, "1%"}, {999_999, 1_000_000, "99%"}, {10, 10, "100%"}, {15, 10, "150%"}, {1 << 62, 1 << 62, "100%"}} {
		if got := percent(test.used, test.limit); got != test.want {
			t.Errorf("%d of %d: %s, want %s", test.used, test.limit, got, test.want)
		}
	}
}

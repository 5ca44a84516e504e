package csi

import (
	"errors"
	"os"
	"strings"
	"testing"
)

var allParameters = []string{ParameterPool, ParameterInodes, ParameterWipe, ParameterUID, ParameterGID, ParameterMode, ParameterSize}

func TestParameters(t *testing.T) {
	for _, c := range []struct {
		from map[string]string
		want parameters
	}{
		{nil, parameters{}},
		{map[string]string{"pool": "fast"}, parameters{pool: "fast"}},
		{map[string]string{"inodes": "1"}, parameters{inodes: 1}},
		{map[string]string{"inodes": "9223372036854775807"}, parameters{inodes: 1<<63 - 1}},
		{map[string]string{"wipe": "true"}, parameters{wipe: true}},
		{map[string]string{"wipe": "false"}, parameters{}},
		{map[string]string{"uid": "1000", "gid": "4294967294"}, parameters{uid: 1000, gid: 4294967294}},
		{map[string]string{"mode": "0770"}, parameters{mode: 0o770}},
		{map[string]string{"mode": "2770"}, parameters{mode: 0o770 | os.ModeSetgid}},
		{map[string]string{"mode": "1777"}, parameters{mode: 0o777 | os.ModeSticky}},
		{map[string]string{"size": "64Mi"}, parameters{size: 64 << 20}},
		{map[string]string{"size": "1G"}, parameters{size: 1e9}},
		{map[string]string{"size": "0.5"}, parameters{size: 1}}, // a part of a byte is one
		{map[string]string{"size": "4Ei"}, parameters{size: 1 << 62}},
		{map[string]string{"csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/": ""}, parameters{}},
		{map[string]string{"pool": "a", "inodes": "2", "wipe": "1", "uid": "3", "gid": "4", "mode": "5", "size": "6"},
			parameters{pool: "a", inodes: 2, wipe: true, uid: 3, gid: 4, mode: 5, size: 6}},
	} {
		var p parameters
		if err := p.parse(c.from, allParameters...); err != nil || p != c.want {
			t.Errorf("%v: %+v, %v, want %+v", c.from, p, err, c.want)
		}
	}
}

// TestBadParameters wants a message to name the parameter and to say what would be right.
func TestBadParameters(t *testing.T) {
	for _, c := range []struct {
		key, right string
		values     []string
	}{
		{"pool", "leave it out for any pool", []string{""}},
		{"inodes", "a number above 0", []string{"", "0", "-1", "1.5", "0x10", "9223372036854775808", "many"}},
		{"wipe", "true nor false", []string{"", "yes", "2"}},
		{"uid", "an id from 0 to 4294967294", []string{"", "-1", "4294967295", "4294967296", "root"}},
		{"gid", "an id from 0 to 4294967294", []string{"", "-1", "4294967295", "wheel"}},
		{"mode", "octal, such as 0770", []string{"", "0", "4755", "8", "rwx", "0o770", "10000", "-1"}},
		{"size", "such as 64Mi or 10Gi, to 4Ei", []string{"", "0", "-1Gi", "64MB", "large", "5Ei", "1e19", "1e30", "18446744073711648768"}},
	} {
		for _, value := range c.values {
			var p parameters
			err := p.parse(map[string]string{c.key: value}, allParameters...)
			wantMessage(t, err, ErrArgument, "parameter "+c.key+":", c.right, value)
		}
	}
}

func TestUnknownParameters(t *testing.T) {
	for _, key := range []string{"", "Pool", "pool ", "size", "csi.storage.k8s.io", "CSI.storage.k8s.io/pvc/name", "other/csi.storage.k8s.io/x"} {
		var p parameters
		err := p.parse(map[string]string{key: "1", "pool": "fast"}, ParameterPool, ParameterInodes)
		wantMessage(t, err, ErrArgument, `"`+key+`" is unknown`, "known are inodes, pool")
	}
}

// wantMessage fails the test unless an error is want and its message has those words.
func wantMessage(t *testing.T, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
}

package app

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/croftfs/croft/fs/pool"
)

var (
	plainNumber = regexp.MustCompile(`^[0-9]+(\.[0-9]*)?$`)
	almostSize  = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) ?([kKmMgGtTpPeE])(i?)[bB]?$`)
)

// parseSize reads a volume's size as Kubernetes writes quantities: 64Mi, 10Gi, 1T, 1.5Gi.
// What cannot be a limit is refused with what would be right.
func parseSize(s string) (uint64, error) {
	q, err := resource.ParseQuantity(s)
	if err != nil {
		return 0, fmt.Errorf("size %q is not understood: %s", s, suggestSize(s))
	}
	if q.Sign() < 0 {
		return 0, fmt.Errorf("size %q is negative", s)
	}
	if q.Cmp(*resource.NewQuantity(pool.MaxBytes, resource.BinarySI)) > 0 {
		return 0, fmt.Errorf("size %q is too large: at most 4Ei are possible", s)
	}
	whole := resource.NewQuantity(q.Value(), resource.BinarySI) // Value rounds up
	switch {
	case q.Sign() == 0:
		return 0, fmt.Errorf("size %q: at least 1Mi is needed", s)
	case whole.Cmp(q) != 0:
		return 0, fmt.Errorf("size %q is not a whole number of bytes: %s", s, suggestSize(s))
	case q.Value() < pool.MinBytes && plainNumber.MatchString(s):
		return 0, fmt.Errorf("size %q has no unit, and is less than 1Mi in bytes: did you mean %sGi?", s, s)
	case q.Value() < pool.MinBytes:
		return 0, fmt.Errorf("size %q: at least 1Mi is needed", s)
	}
	return uint64(q.Value()), nil
}

// suggestSize guesses what was meant.
func suggestSize(s string) string {
	if m := almostSize.FindStringSubmatch(s); m != nil {
		return fmt.Sprintf("did you mean %s%si?", m[1], strings.ToUpper(m[2]))
	}
	if plainNumber.MatchString(s) {
		return fmt.Sprintf("did you mean %sGi?", s)
	}
	return "write it as 64Mi, 10Gi or 1T"
}

// parseInodes reads a number of inodes.
func parseInodes(s string) (uint64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q is not a number of inodes: write a whole number, 1 or more", s)
	}
	return uint64(n), nil
}

// human writes bytes in binary units with at most one decimal, as parseSize reads them: 512, 1.5Gi.
func human(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10)
	}
	v, unit := float64(n)/1024, 0
	const units = "KMGTPE"
	// What would be rounded to 1024 belongs to the next unit.
	for v >= 1023.95 && unit < len(units)-1 {
		v /= 1024
		unit++
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + units[unit:unit+1] + "i"
}

// percent writes used of limit, rounded up: 100% is a full volume, and 0% an empty one.
func percent(used, limit uint64) string {
	if limit == 0 {
		return "-"
	}
	p := uint64(math.Ceil(float64(used) / float64(limit) * 100))
	if p == 100 && used < limit {
		p = 99
	}
	return strconv.FormatUint(p, 10) + "%"
}

// sizeValue is a flag with a size. Its zero value is "not given".
type sizeValue uint64

func (v *sizeValue) Set(s string) (err error) {
	n, err := parseSize(s)
	*v = sizeValue(n)
	return err
}

func (v *sizeValue) Type() string { return "size" }

func (v *sizeValue) String() string {
	if *v == 0 {
		return ""
	}
	return human(uint64(*v))
}

// inodesValue is a flag with a number of inodes. Its zero value is "not given".
type inodesValue uint64

func (v *inodesValue) Set(s string) (err error) {
	n, err := parseInodes(s)
	*v = inodesValue(n)
	return err
}

func (v *inodesValue) Type() string { return "number" }

func (v *inodesValue) String() string {
	if *v == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(*v), 10)
}

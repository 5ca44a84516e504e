package main

import (
	"fmt"
	"slices"
	"strings"
)

// median is 0 for no samples.
func median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// spread is (max-min)/median. Of five or more samples the least and the greatest do not
// count: the range grows with their number, while one stray sample of five does not move
// the median.
func spread(samples []float64) float64 {
	m := median(samples)
	if m == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	if len(s) >= 5 {
		s = s[1 : len(s)-1]
	}
	return (s[len(s)-1] - s[0]) / m
}

// moreRounds is how often a noisy workload is measured the second time.
func moreRounds(rounds int) int { return max(5, rounds+2) }

// tooNoisy tells whether the run as a whole is no result: when more than a tenth of the
// workloads, and more than one, stayed noisy.
func tooNoisy(workloads []Workload) bool {
	noisy := len(noisyOnes(workloads))
	return noisy > 1 && noisy*10 > len(workloads)
}

func noisyOnes(workloads []Workload) []Workload {
	return slices.DeleteFunc(slices.Clone(workloads), func(w Workload) bool { return !w.Noisy })
}

// describeNoise lists the noisy workloads with the spread by which they are.
func describeNoise(workloads []Workload) string {
	var b strings.Builder
	for _, w := range noisyOnes(workloads) {
		fmt.Fprintf(&b, "  %-24s spread %3.0f%%", w.Name, 100*w.lead().Spread)
		if w.FirstSpread > 0 {
			fmt.Fprintf(&b, ", at first %3.0f%%", 100*w.FirstSpread)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

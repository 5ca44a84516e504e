package main

import "testing"

// Shortened; fio says such things before its JSON.
const fioOutput = `fio: this platform does not support process shared mutexes
{
  "fio version" : "fio-3.33",
  "jobs" : [ {
    "jobname" : "x", "error" : 0,
    "read" : { "bw_bytes" : 0, "iops" : 0.0, "runtime" : 0 },
    "write" : { "bw_bytes" : 104857600, "bw" : 102400, "iops" : 25600.5, "runtime" : 1500 }
  } ]
}`

func TestParseFio(t *testing.T) {
	if got, err := parseFio([]byte(fioOutput), true); err != nil || got != 100 {
		t.Errorf("%v MiB/s, %v", got, err)
	}
	if got, err := parseFio([]byte(fioOutput), false); err != nil || got != 25600.5 {
		t.Errorf("%v IOPS, %v", got, err)
	}
	for _, bad := range []string{"", "nonsense", `{"jobs":[]}`, `{"jobs":[{"error":5,"read":{"iops":1}}]}`, `{"jobs":[{"error":0}]}`} {
		if got, err := parseFio([]byte(bad), false); err == nil {
			t.Errorf("%q: %v, and no error", bad, got)
		}
	}
}

func TestFioNamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, j := range fioJobs {
		m := j.metric()
		if seen[m.name] {
			t.Errorf("%s twice", m.name)
		}
		seen[m.name] = true
	}
}

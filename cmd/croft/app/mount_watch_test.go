package app

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatch has a mount that answers, hangs, answers again, and cannot be asked.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var said []string
		note := func(what string) func() {
			return func() { said = append(said, time.Since(began).String()+" "+what) }
		}
		asked := 0
		var hanging chan error
		w := watch{every: time.Second, limit: 3 * time.Second, answered: note("answered"), hung: note("hung")}
		w.ask = func() (<-chan error, func(), error) {
			asked++
			ended := make(chan error, 1)
			switch asked {
			case 1: // at once
				ended <- nil
			case 2: // not for 7 seconds
				hanging = ended
				time.AfterFunc(7500*time.Millisecond, func() { ended <- nil })
			case 3: // with an error: it answers
				ended <- errors.New("not connected")
			case 4:
				return nil, nil, errors.New("no more processes")
			default: // never
				return ended, note("abandoned"), nil
			}
			return ended, func() {}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.run(ctx)
		}()
		time.Sleep(15*time.Second + time.Second/4)
		cancel()
		<-done
		want := []string{
			"1s answered",
			"5s hung", "8s hung", "9.5s answered", // asked at 2s, and not again meanwhile
			"10s answered",
			"11s answered",
			"15s hung", // asked at 12s
			"15.25s abandoned",
		}
		if !reflect.DeepEqual(said, want) || hanging == nil || asked != 5 {
			t.Errorf("asked %d times: %q", asked, said)
		}
	})
}

func TestNextPause(t *testing.T) {
	var got []time.Duration
	for pause := time.Duration(0); len(got) < 9; {
		pause = nextPause(pause)
		got = append(got, pause/time.Millisecond)
	}
	if want := []time.Duration{100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000}; !reflect.DeepEqual(got, want) {
		t.Errorf("%d", got)
	}
}

func TestNewWatch(t *testing.T) {
	for _, c := range []struct {
		limit         time.Duration
		systemd       string // microseconds
		every, limits time.Duration
	}{
		{time.Minute, "", 10 * time.Second, time.Minute},
		{0, "", 0, 0},
		{0, "30000000", 10 * time.Second, 30 * time.Second},
		{time.Minute, "3000000", time.Second, time.Minute},
		{time.Minute, "600000000", 10 * time.Second, time.Minute},
	} {
		t.Setenv("WATCHDOG_USEC", c.systemd)
		w, wanted := New(newHost(t).opts).newWatch(nil, c.limit, nil)
		if w.every != c.every || w.limit != c.limits || wanted != (c.every > 0) {
			t.Errorf("%+v: each %s, %s, %v", c, w.every, w.limit, wanted)
		}
	}
}

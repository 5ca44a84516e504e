package app

import (
	"context"
	"io"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
)

const (
	// looks is how often a mount is asked in the time after which it counts as hung.
	looks = 6
	// systemdLooks is how often systemd is told in the time after which it ends the service (sd_notify(3)
	// wants two at least).
	systemdLooks = 3
)

// newWatch watches places. With systemd's WatchdogSec it tells systemd as long as they answer.
func (a *App) newWatch(places []place, limit time.Duration, hung func()) (w watch, wanted bool) {
	args := []string{"--"}
	for _, p := range places {
		args = append(args, p.mountpoint)
	}
	w = watch{limit: limit, every: limit / looks, answered: func() {}, hung: hung}
	w.ask = func() (<-chan error, func(), error) {
		p, err := startProbe(io.Discard, args...)
		if err != nil {
			return nil, nil, err
		}
		return p.ended, p.abandon, nil
	}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err == nil && interval > 0 {
		w.answered = func() { a.notify("WATCHDOG=1") }
		if every := interval / systemdLooks; limit == 0 || every < w.every {
			w.every = every
		}
		if limit == 0 {
			w.limit = interval
		}
	}
	return w, w.every > 0
}

// watchForSystemd tells systemd that the mounts answer as long as they do, if it wants to know. It ends who
// does not.
func (a *App) watchForSystemd(ctx context.Context, log *zap.Logger, places []place) {
	hung := func() { log.Error("the mounts do not answer") }
	if w, wanted := a.newWatch(places, 0, hung); wanted {
		go w.run(ctx)
	}
}

package infer

import (
	"context"
	"errors"
	"sync"
	"time"
)

// progressEvery bounds how often a download makes its model look again.
const progressEvery = time.Second

// fetching downloads one file, with tries until it is here.
type fetching struct {
	u      unit
	cancel context.CancelFunc
	done   chan struct{}

	mu   sync.Mutex // guards last
	last *failure   // of the last try; nil while a try makes progress
}

func (s *model) startFetch(ctx context.Context, u unit) *fetching {
	ctx, cancel := context.WithCancel(ctx)
	f := &fetching{u: u, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(f.done)
		s.fetch(ctx, f)
	}()
	return f
}

// stop ends the download and returns when it has ended; what is here stays for the next time.
func (f *fetching) stop() {
	f.cancel()
	<-f.done
}

func (f *fetching) failure() *failure {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

func (f *fetching) set(last *failure) (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed = (f.last == nil) != (last == nil) || last != nil && *f.last != *last
	f.last = last
	return changed
}

func (s *model) fetch(ctx context.Context, f *fetching) {
	log := s.m.log.With("model", s.key, "version", f.u.version, "digest", f.u.digest)
	tries := 0
	for {
		before := s.m.files.have(f.u.digest)
		var told time.Time
		err := s.m.files.download(ctx, s.m.cfg.Fetcher, f.u.digest, f.u.size, s.m.tune.fetchStall, func(done int64) {
			if done > before {
				tries = 0
				f.set(nil)
			}
			if now := time.Now(); now.Sub(told) >= progressEvery {
				told = now
				signal(s.wake)
			}
		})
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			log.Info("model file is here", "bytes", f.u.size)
			signal(s.wake)
			return
		}
		var why *failure
		if !errors.As(err, &why) {
			why = &failure{reasonFetchFailed, err.Error()}
		}
		tries++
		wait := backoff(s.m.tune.fetchMin, s.m.tune.fetchMax, tries)
		if f.set(why) {
			log.Warn("download of model file", "reason", why.reason, "error", why.message, "retryIn", wait)
		}
		signal(s.wake)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-s.linkUp:
			tries = 0
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

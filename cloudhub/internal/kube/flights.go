package kube

import (
	"context"
	"errors"
	"sync"
)

// flights shares the answers of requests that many ask at the same time. Whoever asks gets an answer to a request that was
// made after the question: one that is already under way is too old. Safe for concurrent use; the zero value is ready.
type flights[T any] struct {
	mu sync.Mutex
	// under way and next to go, by key
	now, next map[string]*flight[T]
}

type flight[T any] struct {
	done   chan struct{}
	answer T
	err    error
}

// do returns fetch's answer for key.
func (f *flights[T]) do(ctx context.Context, key string, fetch func(context.Context) (T, error)) (T, error) {
	for {
		f.mu.Lock()
		if f.now == nil {
			f.now, f.next = map[string]*flight[T]{}, map[string]*flight[T]{}
		}
		mine, before := f.next[key], f.now[key]
		leads := mine == nil
		if leads {
			mine = &flight[T]{done: make(chan struct{})}
			f.next[key] = mine
		}
		f.mu.Unlock()

		if leads {
			f.lead(ctx, key, mine, before, fetch)
			return mine.answer, mine.err
		}
		select {
		case <-mine.done:
		case <-ctx.Done():
			var none T
			return none, ctx.Err()
		}
		// That the one who led gave up is no answer to us.
		gaveUp := errors.Is(mine.err, context.Canceled) || errors.Is(mine.err, context.DeadlineExceeded)
		if !gaveUp || ctx.Err() != nil {
			return mine.answer, mine.err
		}
	}
}

// lead makes the request once the one before it is over.
func (f *flights[T]) lead(ctx context.Context, key string, mine, before *flight[T], fetch func(context.Context) (T, error)) {
	defer close(mine.done)
	if before != nil {
		select {
		case <-before.done:
		case <-ctx.Done():
			f.mu.Lock()
			delete(f.next, key)
			f.mu.Unlock()
			mine.err = ctx.Err()
			return
		}
	}
	f.mu.Lock()
	delete(f.next, key)
	f.now[key] = mine
	f.mu.Unlock()
	mine.answer, mine.err = fetch(ctx)
	if ctx.Err() != nil {
		mine.err = ctx.Err()
	}
	f.mu.Lock()
	if f.now[key] == mine {
		delete(f.now, key)
	}
	f.mu.Unlock()
}

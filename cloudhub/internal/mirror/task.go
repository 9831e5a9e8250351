package mirror

import "sync"

// task runs a function on a goroutine of its own whenever it was woken, never twice at a time. In between it costs no goroutine and
// no stack, which counts when there is one for every edge. Safe for concurrent use.
type task struct {
	group *tasks
	do    func()

	mu      sync.Mutex
	running bool // guarded by mu
	again   bool // guarded by mu: woken while running
}

// wake never blocks; it may be called with any lock held.
func (t *task) wake() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running {
		t.again = true
		return
	}
	t.running = t.group.start(t.run)
}

func (t *task) run() {
	for more := true; more; {
		t.do()
		t.mu.Lock()
		more = t.again
		t.again, t.running = false, more
		t.mu.Unlock()
	}
}

// tasks counts the goroutines of tasks for the one who waits for them. Until it is opened, and once it is closed, no task runs.
type tasks struct {
	mu      sync.Mutex
	opened  bool // guarded by mu
	closed  bool // guarded by mu
	running sync.WaitGroup
}

// start says whether it started a goroutine for run.
func (g *tasks) start(run func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.opened || g.closed {
		return false
	}
	g.running.Go(run)
	return true
}

// open lets tasks run; those woken before have to be woken again.
func (g *tasks) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened = true
}

func (g *tasks) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// close lets no task run any more and returns when none does.
func (g *tasks) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.running.Wait()
}

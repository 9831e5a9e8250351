// Command bench measures the figures of docs/PERFORMANCE.md on the built commands: each several times in one go, beside the
// value to reach and, where there is one, beside what KubeEdge was measured to do. It prints a table, writes bench.json and,
// with -markdown, the table of the page. A figure that misses its value does not make it fail; one that cannot be measured does.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// limit bounds one experiment.
const limit = 30 * time.Minute

// sizes of what is measured.
type sizes struct {
	runs        int
	records     int // of a backlog
	edges       int // full edge hubs
	beside      int // hollow edges beside them, with a folder as source
	hollow      int // hollow edges, with Kubernetes as source
	subscribers []int
	publishers  int
	settle      time.Duration // before memory is read
	rest        time.Duration // the same for many edges: longer than the Go runtime leaves a quiet process without a collection
}

func full() sizes {
	return sizes{runs: 5, records: 1_000_000, edges: 10, beside: 90, hollow: 1000, subscribers: []int{1000, 5000, 19_000}, publishers: 1000, settle: 20 * time.Second, rest: 140 * time.Second}
}

// quick sizes show that everything works; their figures mean little.
func quick() sizes {
	return sizes{runs: 2, records: 50_000, edges: 3, beside: 17, hollow: 50, subscribers: []int{50, 100}, publishers: 50, settle: 3 * time.Second, rest: 3 * time.Second}
}

// bench is one go of the program.
type bench struct {
	sizes
	bin     rig.Bin
	dir     string
	results results
}

// experiment measures some figures on a set-up of its own.
type experiment struct {
	name    string
	figures string // what it measures, for people
	run     func(ctx context.Context, b *bench) error
}

func experiments() []experiment {
	return []experiment{
		{"readings", "600 readings in 1 s, until they are durable in the cloud", readings},
		{"replay", "replay of a backlog: rate, memory, disk", replay},
		{"fleet", "a small fleet on a folder: change until applied, restart of the hub", fleet},
		{"reconnect", "bytes of a reconnect with nothing changed", reconnect},
		{"agent", "memory of the edge agent, sizes of the commands", agent},
		{"inference", "inference through the edge's door against the worker directly", inference},
		{"broker", "fan-out and fan-in against mosquitto", brokers},
		{"kubernetes", "410 pods for 41 edges, then a fleet, through a real API server", kubernetes},
	}
}

func main() {
	if len(os.Args) == 4 && os.Args[1] == crowdCommand {
		if err := runCrowd(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, "bench: crowd:", err)
			os.Exit(1)
		}
		return
	}
	bin := flag.String("bin", "bin", "`folder` of the built commands")
	only := flag.String("only", "", "measure only this `experiment`; the other rows of the output stay as they are")
	skip := flag.String("skip", "", "leave out this `experiment`, such as kubernetes where no control plane can be built")
	small := flag.Bool("quick", false, "small sizes, to see that everything works")
	out := flag.String("o", "bench.json", "`file` for the figures, as JSON")
	markdown := flag.String("markdown", "", "`file` whose table between the bench markers is replaced, such as docs/PERFORMANCE.md")
	runs := flag.Int("runs", 0, "how often each figure is measured (default 5)")
	hollow := flag.Int("hollow", 0, "hollow edges of the fleet at the API server (default 1000)")
	records := flag.Int("records", 0, "records of the backlog (default 1000000)")
	flag.Parse()
	size := full()
	if *small {
		size = quick()
	}
	size.runs, size.hollow, size.records = cmp.Or(*runs, size.runs), cmp.Or(*hollow, size.hollow), cmp.Or(*records, size.records)
	if err := run(*bin, *only, *skip, *out, *markdown, size); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(bin, only, skip, out, markdown string, size sizes) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(bin, "edgehub")); err != nil {
		return fmt.Errorf("%w: build the commands first (make bin)", err)
	}
	b := &bench{sizes: size, bin: rig.Bin(bin)}
	if only != "" {
		if b.results, err = readResults(out); err != nil {
			return err
		}
	}
	if b.dir, err = os.MkdirTemp("", "lsb-"); err != nil {
		return err
	}
	where := describeMachine()
	fmt.Println(where)
	failed, err := b.runAll(ctx, only, skip)
	if err != nil {
		return err
	}
	if err := errors.Join(b.results.print(os.Stdout), b.results.write(out)); err != nil {
		return err
	}
	if markdown != "" {
		if err := b.results.markdown(markdown, where); err != nil {
			return err
		}
	}
	if failed != nil {
		return fmt.Errorf("%w\nlogs and state are kept in %s", failed, b.dir)
	}
	return os.RemoveAll(b.dir)
}

// runAll goes on after an experiment that failed; failed says which did. err is one that ends everything.
func (b *bench) runAll(ctx context.Context, only, skip string) (failed, err error) {
	measured := 0
	for _, e := range experiments() {
		if e.name == skip || only != "" && e.name != only {
			continue
		}
		measured++
		fmt.Printf("== %s: %s\n", e.name, e.figures)
		begin := time.Now()
		if err := b.one(ctx, e); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			fmt.Printf("   failed: %v\n", err)
			failed = errors.Join(failed, fmt.Errorf("%s: %w", e.name, err))
		}
		fmt.Printf("   %s\n", time.Since(begin).Round(time.Second))
	}
	if measured == 0 {
		names := ""
		for _, e := range experiments() {
			names += " " + e.name
		}
		return nil, fmt.Errorf("there is no experiment %q; there are:%s", only, names)
	}
	return failed, nil
}

func (b *bench) one(ctx context.Context, e experiment) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return e.run(ctx, b)
}

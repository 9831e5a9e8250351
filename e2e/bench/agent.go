package main

import (
	"context"
	"os"
)

// agent measures an edge agent's memory with 10 pods and one model desired, its worker apart, anew after each start.
func agent(ctx context.Context, b *bench) (err error) {
	s, e, err := b.dock(ctx, "agent", 10)
	if err != nil {
		return err
	}
	defer s.close(&err)
	for run := range b.runs {
		if run > 0 {
			if err := end(e.Process); err != nil {
				return err
			}
			if err := e.Start(ctx); err != nil {
				return err
			}
			if err := s.synced(ctx, e, 10, 1); err != nil {
				return err
			}
		}
		if err := pause(ctx, b.settle); err != nil {
			return err
		}
		all, err := rss(e.PID())
		if err != nil {
			return err
		}
		own, err := pss(e.PID())
		if err != nil {
			return err
		}
		const compare = "115 to 125 MB"
		b.record(figure{Name: "agent-rss", What: "RSS of the edge agent, 10 pods and one model desired, the worker apart", Unit: "MiB", Reach: atMost(40), Compare: compare}, float64(all)/mib)
		b.record(figure{Name: "agent-pss", What: "the same, PSS", Unit: "MiB", Reach: atMost(40), Compare: compare}, float64(own)/mib)
	}
	for _, c := range []struct {
		command string
		reach   *reach
	}{{"edgehub", atMost(35)}, {"longshore-worker", nil}, {"cloudhub", nil}} {
		st, err := os.Stat(b.bin.Path(c.command))
		if err != nil {
			return err
		}
		b.record(figure{Name: "size-" + c.command, What: "size of the stripped command " + c.command, Unit: "MB", Reach: c.reach}, float64(st.Size())/1e6)
	}
	return nil
}

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// selection is what the telemetry commands ask for.
type selection struct {
	edge, stream, since, until string
	limit                      int
}

func (s *selection) bind(f *pflag.FlagSet) {
	f.StringVar(&s.edge, "edge", "", "only this edge")
	f.StringVar(&s.stream, "stream", "", "only this stream")
	f.StringVar(&s.since, "since", "", "only from this time on: 2026-01-31T08:00:00Z, or 15m for the last 15 minutes")
	f.StringVar(&s.until, "until", "", "only before this time, as --since")
	f.IntVar(&s.limit, "limit", 0, "at most so `many`; 0 is all")
}

func (s *selection) query(now time.Time) (url.Values, error) {
	if s.limit < 0 {
		return nil, usagef("--limit %d: want a number of records, or 0 for all", s.limit)
	}
	v := url.Values{}
	for key, value := range map[string]string{"edge": s.edge, "stream": s.stream} {
		if value != "" {
			v.Set(key, value)
		}
	}
	for key, value := range map[string]string{"from": s.since, "to": s.until} {
		if value == "" {
			continue
		}
		if d, err := time.ParseDuration(value); err == nil {
			v.Set(key, now.Add(-d).UTC().Format(time.RFC3339Nano))
			continue
		}
		if _, err := time.Parse(time.RFC3339Nano, value); err != nil {
			return nil, usagef("time %q: want 2026-01-31T08:00:00Z, or 15m for 15 minutes ago", value)
		}
		v.Set(key, value)
	}
	return v, nil
}

func telemetryCommand() *cobra.Command {
	var c client
	var sel selection
	var tail int
	var output string
	cmd := &cobra.Command{
		Use:   "telemetry",
		Short: "Show telemetry that arrived",
		Long: `Show telemetry that arrived, oldest first within each edge and stream: one JSON object per line (-o ndjson) or a table.

  cloudhub telemetry --edge box-1 --stream vibration --since 15m | jq -r .payload

It reads everything that matches, page by page. Programs get the same from the hub's GET /api/v1/telemetry, with edge,
stream, from, to and limit (1000 unless told, 1000000 at most). If there is more than the limit, the answer ends with the HTTP
trailer Longshore-After: pass its value, which is edge/stream/epoch/sequence of the last line, as after= to go on from there.
tail in place of limit is --tail.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("-o", output, "ndjson", "table"); err != nil {
				return err
			}
			q, err := sel.query(time.Now())
			if err != nil {
				return err
			}
			show := copyRecords
			if output == "table" {
				show = printRecords
			}
			if cmd.Flags().Changed("tail") {
				if tail < 1 || sel.limit > 0 {
					return usagef("--tail %d: want a number of records from 1 on, and no --limit with it", tail)
				}
				q.Set("tail", strconv.Itoa(tail))
				return readPage(cmd.Context(), &c, q, func(res *http.Response) error { return show(cmd.OutOrStdout(), res.Body) })
			}
			return readRecords(cmd.Context(), &c, q, sel.limit, pageRecords, func(body io.Reader) error { return show(cmd.OutOrStdout(), body) })
		},
	}
	cmd.Flags().AddFlagSet(c.flags())
	sel.bind(cmd.Flags())
	cmd.Flags().IntVar(&tail, "tail", 0, "only the newest `many` of each edge and stream")
	cmd.Flags().StringVarP(&output, "output", "o", "ndjson", "ndjson or table")
	cmd.AddCommand(ledgerCommand())
	return cmd
}

// pageRecords is how many records are asked for at a time: the hub's store is not held for as long as a slow reader takes.
const pageRecords = 10_000

// readRecords shows everything that q selects, limit records at most (0: all), a page at a time.
func readRecords(ctx context.Context, c *client, q url.Values, limit, page int, show func(body io.Reader) error) error {
	for left := limit; ; left -= page {
		if limit > 0 {
			page = min(page, left)
		}
		q.Set("limit", strconv.Itoa(page))
		var after string
		err := readPage(ctx, c, q, func(res *http.Response) error {
			err := show(res.Body)
			after = res.Trailer.Get(trailerAfter)
			return err
		})
		if err != nil {
			return err
		}
		if after == "" || limit > 0 && page == left {
			return nil
		}
		q.Set("after", after)
	}
}

// readPage shows one answer.
func readPage(ctx context.Context, c *client, q url.Values, show func(*http.Response) error) error {
	res, err := c.get(ctx, "/api/v1/telemetry", q)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if err := show(res); err != nil {
		return fmt.Errorf("the answer broke off: %w", err)
	}
	return nil
}

func copyRecords(w io.Writer, body io.Reader) error {
	_, err := io.Copy(w, body)
	return err
}

func printRecords(w io.Writer, body io.Reader) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "TIME\tCLOCK\tEDGE\tSTREAM\tSEQUENCE\tTOPIC\tPAYLOAD")
	lines := json.NewDecoder(bufio.NewReader(body))
	for {
		var r recordJSON
		err := lines.Decode(&r)
		if errors.Is(err, io.EOF) {
			return t.Flush()
		}
		if err != nil {
			return err
		}
		payload := fmt.Sprintf("(%d bytes)", len(r.PayloadBase64))
		if r.Payload != nil {
			payload = fmt.Sprintf("%.60q", *r.Payload)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", r.Time.Format(time.RFC3339Nano), r.Clock, r.Edge, r.Stream, r.Sequence, r.Topic, payload)
	}
}

func ledgerCommand() *cobra.Command {
	var c client
	var sel selection
	var output string
	cmd := &cobra.Command{
		Use:   "ledger",
		Short: "Show the books: accepted = delivered + ledgered",
		Long: `Show the books of each edge and stream. Every record that an edge acknowledged to its producer is delivered, or
ledgered with a reason; OPEN ones still wait on the edge. Below the sums stand the losses, if there are any.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("-o", output, "table", "json"); err != nil {
				return err
			}
			q, err := sel.query(time.Now())
			if err != nil {
				return err
			}
			q.Set("limit", strconv.Itoa(cmp.Or(sel.limit, maxRecords)))
			var l ledgerJSON
			if err := c.getJSON(cmd.Context(), "/api/v1/ledger", q, &l); err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), l)
			}
			return printLedger(cmd.OutOrStdout(), l)
		},
	}
	cmd.Flags().AddFlagSet(c.flags())
	sel.bind(cmd.Flags())
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

func printLedger(w io.Writer, l ledgerJSON) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "EDGE\tSTREAM\tACCEPTED\tDELIVERED\tLEDGERED\tOPEN\tDUPLICATES\tRESENT\tCONFLICTS")
	for _, s := range l.Sums {
		open := int64(s.Accepted) - int64(s.Delivered) - int64(s.Ledgered)
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\n", s.Edge, s.Stream, s.Accepted, s.Delivered, s.Ledgered, open, s.Duplicates, s.Resent, s.Conflicts)
	}
	if len(l.Entries) > 0 {
		fmt.Fprintln(t)
		fmt.Fprintln(t, "LOSSES\tSTREAM\tEPOCH\tFIRST\tLAST\tREASON\tAT")
	}
	for _, e := range l.Entries {
		fmt.Fprintf(t, "%s\t%s\t%.8s\t%d\t%d\t%s\t%s\n", e.Edge, e.Stream, e.Epoch, e.First, e.Last, e.Reason, e.At.Format(time.RFC3339))
	}
	return t.Flush()
}

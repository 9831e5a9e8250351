package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	f.IntVar(&s.limit, "limit", 1000, "at most so many records")
}

func (s *selection) query(now time.Time) (url.Values, error) {
	v := url.Values{"limit": {strconv.Itoa(s.limit)}}
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
	var output string
	cmd := &cobra.Command{
		Use:   "telemetry",
		Short: "Show telemetry that arrived",
		Long: `Show telemetry that arrived, oldest first within each edge and stream: one JSON object per line (-o ndjson) or a table.

  cloudhub telemetry --edge box-1 --stream vibration --since 15m | jq -r .payload`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("-o", output, "ndjson", "table"); err != nil {
				return err
			}
			q, err := sel.query(time.Now())
			if err != nil {
				return err
			}
			body, err := c.get(cmd.Context(), "/api/v1/telemetry", q)
			if err != nil {
				return err
			}
			defer body.Close()
			if output == "ndjson" {
				if _, err := io.Copy(cmd.OutOrStdout(), body); err != nil {
					return fmt.Errorf("the answer broke off: %w", err)
				}
				return nil
			}
			return printRecords(cmd.OutOrStdout(), body)
		},
	}
	cmd.Flags().AddFlagSet(c.flags())
	sel.bind(cmd.Flags())
	cmd.Flags().StringVarP(&output, "output", "o", "ndjson", "ndjson or table")
	cmd.AddCommand(ledgerCommand())
	return cmd
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
			return fmt.Errorf("the answer broke off: %w", err)
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

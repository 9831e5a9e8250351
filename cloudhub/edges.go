package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/longshore-edge/longshore/cloudhub/internal/enrol"
	"github.com/longshore-edge/longshore/sync/durable"
)

func edgesCommand() *cobra.Command {
	var c client
	var output string
	cmd := &cobra.Command{
		Use:   "edges",
		Short: "Show edges: link, in step or not, models, backlog",
		Long: `Show every edge of a running hub.

SYNCED says whether the edge confirmed that it holds exactly what the specs say for it. BACKLOG counts telemetry records
that the edge still holds.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("-o", output, "table", "json"); err != nil {
				return err
			}
			var edges []edgeJSON
			if err := c.getJSON(cmd.Context(), "/api/v1/edges", nil, &edges); err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), edges)
			}
			return printEdges(cmd.OutOrStdout(), edges, time.Now())
		},
	}
	cmd.Flags().AddFlagSet(c.flags())
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.AddCommand(enrollCommand())
	return cmd
}

func oneOf(flag, value string, allowed ...string) error {
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	return usagef("%s %q: want %s", flag, value, strings.Join(allowed, " or "))
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func printEdges(w io.Writer, edges []edgeJSON, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "NAME\tLINK\tSYNCED\tPODS\tMODELS\tBACKLOG\tLAST CONTACT\tVERSION")
	for _, e := range edges {
		models := make([]string, 0, len(e.Models))
		for _, m := range e.Models {
			models = append(models, modelText(m))
		}
		contact := "never"
		if e.LastContact != nil {
			contact = now.Sub(*e.LastContact).Round(time.Second).String() + " ago"
		}
		fmt.Fprintf(t, "%s\t%s\t%t\t%d\t%s\t%d\t%s\t%s\n", e.Name, e.Link, e.Synced, len(e.Pods), or(strings.Join(models, ", "), "-"),
			e.BacklogRecords, contact, or(e.AgentVersion, "-"))
	}
	return t.Flush()
}

// modelText is like "bearing 1.2.0 Serving" or "bearing 1.3.0 Failed (LoadFailed), 1.2.0 serves".
func modelText(m modelJSON) string {
	text := m.Name + " " + m.DesiredVersion + " " + m.State
	if m.State == "Downloading" && m.BytesTotal > 0 {
		text += fmt.Sprintf(" %d%%", 100*m.BytesDone/m.BytesTotal)
	}
	if m.Reason != "" {
		text += " (" + m.Reason + ")"
	}
	if m.ServingVersion != "" && m.ServingVersion != m.DesiredVersion {
		text += ", " + m.ServingVersion + " serves"
	}
	return text
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}

func enrollCommand() *cobra.Command {
	var cfg config
	var file, output string
	var replace bool
	settings := cfg.flags()
	cmd := &cobra.Command{
		Use:   "enroll NAME",
		Short: "Make a credential for an edge",
		Long: `Make a credential for an edge: a random token and the public key of this hub. The file goes to the edge; the hub keeps only
the token's hash. It works while the hub runs and while it does not; a running hub takes the edge from that moment.

The edge also needs an Edge of that name among the specs (kind: Edge, apiVersion: longshore.dev/v1alpha1).`,
		Example: `  cloudhub edges enroll box-1 -o box-1.yaml`,
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := load(settings, file); err != nil {
				return err
			}
			cfg.tokenFile()
			return enroll(cfg, args[0], output, replace, cmd.OutOrStdout())
		},
	}
	// All settings of run are known, so that both can share one YAML file; only these three matter here.
	for _, name := range []string{"data", "token-file", "signing-key"} {
		cmd.Flags().AddFlag(settings.Lookup(name))
	}
	cmd.Flags().StringVar(&file, "config", "", "YAML `file` of cloudhub run (environment "+configVariable+")")
	cmd.Flags().StringVarP(&output, "output", "o", "", "`file` to write, readable by you alone; empty: standard output")
	cmd.Flags().BoolVar(&replace, "replace", false, "give a new token to an edge that has one; the old one ends")
	return cmd
}

func enroll(cfg config, edge, output string, replace bool, stdout io.Writer) (err error) {
	if err := durable.MkdirAll(cfg.Data, 0o700); err != nil {
		return usagef("make the data folder: %w (name the hub's with --data)", err)
	}
	key, err := enrol.SigningKey(cfg.SigningKey)
	if err != nil {
		return err
	}
	if output != "" {
		flags := os.O_WRONLY | os.O_CREATE | os.O_EXCL
		if replace {
			flags = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
		}
		f, err := os.OpenFile(output, flags, 0o600)
		if errors.Is(err, os.ErrExist) {
			return usagef("%s is there already: choose another file, or add --replace for a new token", output)
		}
		if err != nil {
			return usagef("write the credential: %w", err)
		}
		defer func() {
			if f.Close(); err != nil && !replace {
				os.Remove(output)
			}
		}()
		stdout = f
	}
	token, err := enrol.Enroll(cfg.TokenFile, edge, replace)
	if errors.Is(err, enrol.ErrEnrolled) {
		return usagef("%w: add --replace for a new token; the old one ends then", err)
	}
	if err != nil {
		return err
	}
	text, err := enrol.NewCredential(edge, token, key).YAML()
	if err != nil {
		return err
	}
	_, err = stdout.Write(text)
	return err
}

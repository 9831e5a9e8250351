package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// errNotRunning says that no agent answers in a state folder.
var errNotRunning = errors.New("no agent runs")

// ask gets a path from the agent that has the state folder, over its Unix socket.
func ask(ctx context.Context, state stateDir, path string) ([]byte, error) {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", state.socket())
	}}
	defer t.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: t}).Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w with the state folder %s: start it with `edgehub run`, or name the right folder with --state", errNotRunning, state)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("ask the agent: %s: permission denied: run this command as the agent's user, such as root", state.socket())
	case err != nil:
		return nil, fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("ask the agent: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask the agent: %s: %s", resp.Status, strings.TrimSpace(string(b)))
	}
	return b, nil
}

// askStatus gets the running agent's status, raw and decoded.
func askStatus(cmd *cobra.Command) ([]byte, Status, error) {
	var s Status
	cfg, err := commandConfig(cmd)
	if err != nil {
		return nil, s, err
	}
	b, err := ask(cmd.Context(), stateDir(cfg.State), "/status")
	if err != nil {
		return nil, s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, s, fmt.Errorf("read the agent's status: %w", err)
	}
	return b, s, nil
}

func outputFlag(cmd *cobra.Command) { cmd.Flags().StringP("output", "o", "text", "text or json") }

// wantsJSON reads the flag -o.
func wantsJSON(cmd *cobra.Command) (bool, error) {
	v, err := cmd.Flags().GetString("output")
	if err == nil && v != "text" && v != "json" {
		err = fmt.Errorf("flag --output: %q is neither text nor json", v)
	}
	return v == "json", err
}

func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "status", Short: "Show link, list, pods, models, telemetry, clock and disk of the running agent",
		Long: `status asks the running agent, over a socket in its state folder, and shows:

  Link       up, down or superseded (another box uses the same credential), since when, and why it last ended
  List       digest of the list of objects this edge holds, and whether the hub confirmed it as the newest in this session
  Pods       phase, and what they wait for
  Models     desired and serving version, state, and why a version does not serve
  Telemetry  per stream: accepted (acknowledged to devices), acked (durable in the cloud), held, dropped (in the ledger), refused`,
		Example: "  edgehub status\n  edgehub status -o json --state /var/lib/longshore", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := wantsJSON(cmd)
			if err != nil {
				return err
			}
			raw, s, err := askStatus(cmd)
			if err != nil {
				return err
			}
			if asJSON {
				_, err = cmd.OutOrStdout().Write(raw)
				return err
			}
			printStatus(cmd.OutOrStdout(), s)
			return nil
		},
	}
	outputFlag(cmd)
	return cmd
}

func modelsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "models", Short: "List the models of the running agent", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := wantsJSON(cmd)
			if err != nil {
				return err
			}
			_, s, err := askStatus(cmd)
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(s.Models)
			}
			if len(s.Models) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "no models")
			}
			printModels(cmd.OutOrStdout(), s.Models)
			return nil
		},
	}
	outputFlag(cmd)
	return cmd
}

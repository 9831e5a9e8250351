package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/longshore-edge/longshore/sync/outbox"
)

func leaveCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "leave", Short: "Forget the cluster: remove everything the agent keeps on this box",
		Long: `leave removes the specs, model files and telemetry that the agent keeps in its state folder. The agent must be stopped
first. Telemetry that is not in the cloud yet is lost; leave says how much that is, and does nothing without --yes.
The credential file stays; on the hub, delete the Edge and its token.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := commandConfig(cmd)
			if err != nil {
				return err
			}
			return leave(cmd, cfg, yes)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "really remove it")
	return cmd
}

func leave(cmd *cobra.Command, cfg Config, yes bool) (err error) {
	state, out := stateDir(cfg.State), cmd.OutOrStdout()
	if _, err := os.Stat(state.lock()); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is no state folder of an agent: name the right one with --state", state)
	}
	lock, err := state.open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	held, err := heldRecords(state, cfg.quotas())
	if err != nil {
		fmt.Fprintf(out, "telemetry that waits here cannot be counted: %v\n", err)
	}
	if held > 0 {
		fmt.Fprintf(out, "%d telemetry records are not in the cloud yet and will be lost.\n", held)
	}
	if !yes {
		return fmt.Errorf("nothing removed: to remove everything the agent keeps in %s, run this again with --yes", state)
	}
	if err := state.wipe(); err != nil {
		return fmt.Errorf("remove the agent's state: %w", err)
	}
	fmt.Fprintf(out, "removed everything the agent kept in %s; the credential file stays\n", state)
	return nil
}

// heldRecords counts the records of a stopped agent that are not in the cloud.
func heldRecords(state stateDir, quotas map[string]outbox.Quota) (held uint64, err error) {
	if _, err := os.Stat(state.outbox()); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	log, err := outbox.Open(state.outbox(), outbox.Config{Logger: slog.New(slog.DiscardHandler), Quotas: quotas})
	if err != nil {
		return 0, err
	}
	streams, _ := log.Stats()
	for _, s := range streams {
		held += s.Held
	}
	return held, log.Close()
}

// Command cloudhub mirrors specs from Kubernetes, or from a folder of YAML, to edge hubs behind NAT and flaky links, and
// takes their telemetry.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker for releases.
var version string

// Exit codes: 1 for what went wrong while running, 2 for what was wrong with the command line or the configuration.
const (
	exitFailed = 1
	exitUsage  = 2
)

// usageError is what the caller has to change before trying again.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, rootCommand())
	stop()
	os.Exit(code)
}

// execute runs a command and returns the exit code.
func execute(ctx context.Context, root *cobra.Command) int {
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(root.ErrOrStderr(), "cloudhub:", err)
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "cloudhub",
		Short: "The cloud side of Longshore",
		Long: `cloudhub mirrors pods and models to edges that Kubernetes cannot reach, and takes their telemetry.

A first hub, on this machine, without a cluster:

  cloudhub edges enroll box-1 -o box-1.yaml     # a credential for an edge
  cloudhub run --manifests ./manifests          # Edges, Models, Pods as YAML
  cloudhub edges                                # who is connected, and in step
  cloudhub telemetry --edge box-1               # what arrived`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usageArgs(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w (see %s --help)", err, cmd.CommandPath())
	})
	root.AddCommand(runCommand(), edgesCommand(), telemetryCommand(), crdsCommand(), versionCommand())
	return root
}

// usageArgs makes what check finds a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usagef("%w (see %s --help)", err, cmd.CommandPath())
		}
		return nil
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this command",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "cloudhub", buildVersion())
			return err
		},
	}
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version string

// versionString is the agent's version, for people.
func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

func main() { os.Exit(execute()) }

// execute runs the command and returns the exit code.
func execute() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "edgehub:", err)
		return 1
	}
	return 0
}

// newCommand makes the command with all its subcommands.
func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "edgehub",
		Short: "Longshore's agent on an edge box",
		Long: `edgehub keeps what the cluster wants on this box, also with no link at all: it mirrors pod and model specs,
serves models, takes messages of devices over MQTT, and brings telemetry to the cloud when there is a link.

Every setting can be given as a flag, as an environment variable and in a YAML file; flags win over variables, variables
over the file. The file is ` + defaultConfig + ` or what --config says:

  state: /var/lib/longshore
  credential: /etc/longshore/credential.yaml   # from: cloudhub edges enroll NAME -o FILE
  hub:
    url: wss://hub.example.org/mqtt
  streams:
    - name: vibration
      topics: ["sensors/+/vibration"]
      maxBytes: 256MiB
      maxAge: 7d
      policy: drop-oldest                      # or refuse: then devices keep what does not fit`,
		SilenceErrors: true, SilenceUsage: true,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().String("config", "", "configuration file [$"+configVariable+"] (default "+defaultConfig+" if it is there)")
	root.PersistentFlags().String("state", "", "folder for everything the agent keeps [$LONGSHORE_STATE] (default "+defaultState+")")
	root.AddCommand(runCommand(), statusCommand(), modelsCommand(), leaveCommand(), bundleCommand(), versionCommand())
	return root
}

// commandConfig loads what the command's flags, the environment and the file say, without validating it.
func commandConfig(cmd *cobra.Command) (Config, error) {
	flags := map[string]string{}
	for _, s := range settings() {
		if f := cmd.Flags().Lookup(s.flag()); f != nil && f.Changed {
			flags[s.flag()] = f.Value.String()
		}
	}
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return Config{}, err
	}
	if v, ok := os.LookupEnv(configVariable); ok && file == "" {
		file = v
	}
	return loadConfig(file, os.LookupEnv, flags)
}

func runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the agent until SIGTERM or SIGINT",
		Example: `  edgehub run --credential credential.yaml --hub-url tcp://hub.example.org:1883 --hub-files http://hub.example.org:8080
  edgehub run --config /etc/longshore/edgehub.yaml --log-level debug`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := commandConfig(cmd)
			if err != nil {
				return err
			}
			if err := cfg.validate(); err != nil {
				return fmt.Errorf("configuration: %w", err)
			}
			limitMemory(cfg.Memory)
			logs := &logRing{}
			log := newLogger(cfg.Log, io.MultiWriter(cmd.ErrOrStderr(), logs))
			a, err := newAgent(cfg, log, logs)
			if err != nil {
				return err
			}
			if cfg.Hub.Files == "" {
				a.warn("hub.files is not set, so no model can be fetched: set it to the hub's HTTP address (--hub-files)", "hub", cfg.Hub.URL)
			}
			return a.Run(cmd.Context())
		},
	}
	d := defaults()
	shown := map[string]string{"broker.listen": d.Broker.Listen, "broker.maxConnections": "10000", "http.listen": d.HTTP.Listen, "models.diskQuota": "2GiB",
		"models.memoryLimit": "512MiB", "telemetry.backlogRate": "1MiB", "memory.limit": "48MiB", "memory.gcPercent": "50",
		"log.format": d.Log.Format, "log.level": d.Log.Level}
	for _, s := range settings() {
		if s.key == "state" {
			continue
		}
		usage := s.usage + " [$" + s.env() + "]"
		if v := shown[s.key]; v != "" {
			usage += " (default " + v + ")"
		}
		if strings.HasSuffix(s.key, ".allowAnonymous") {
			cmd.Flags().Bool(s.flag(), false, usage)
			continue
		}
		cmd.Flags().String(s.flag(), "", usage)
	}
	return cmd
}

// limitMemory tells the garbage collector that the box is small, unless its own variables say something else.
func limitMemory(m MemoryConfig) {
	if _, ok := os.LookupEnv("GOMEMLIMIT"); !ok && m.Limit > 0 {
		debug.SetMemoryLimit(int64(m.Limit))
	}
	if _, ok := os.LookupEnv("GOGC"); !ok && m.GCPercent > 0 {
		debug.SetGCPercent(int(m.GCPercent))
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintln(cmd.OutOrStdout(), strings.TrimSpace("edgehub "+versionString()))
		},
	}
}

package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
)

func bundleCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "support-bundle", Short: "Write a file with what is needed to find a fault, without secrets",
		Long: `support-bundle writes a tar.gz with the agent's status, configuration, newest log lines, goroutines and metrics, and
a list of the files in the state folder. It holds no token, no key and no content of Secrets. With the agent stopped it
holds what can be had then.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := commandConfig(cmd)
			if err != nil {
				return err
			}
			if file == "" {
				file = "longshore-support-" + time.Now().UTC().Format("20060102T150405Z") + ".tar.gz"
			}
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return fmt.Errorf("write support bundle: %w", err)
			}
			if err := errors.Join(writeBundle(cmd, cfg, f), f.Close()); err != nil {
				return errors.Join(fmt.Errorf("write support bundle: %w", err), os.Remove(file))
			}
			fmt.Fprintln(cmd.OutOrStdout(), "wrote", file)
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "file to write (default longshore-support-<time>.tar.gz)")
	return cmd
}

func writeBundle(cmd *cobra.Command, cfg Config, w io.Writer) error {
	zip := gzip.NewWriter(w)
	t := tar.NewWriter(zip)
	add := func(name string, b []byte) error {
		if err := t.WriteHeader(&tar.Header{Name: "longshore-support/" + name, Mode: 0o600, Size: int64(len(b)), ModTime: time.Now()}); err != nil {
			return err
		}
		_, err := t.Write(b)
		return err
	}
	var errs []error
	state := stateDir(cfg.State)
	for name, path := range map[string]string{
		"status.json": "/status", "config.json": "/config", "log.txt": "/logs", "goroutines.txt": "/goroutines", "metrics.txt": "/metrics",
	} {
		b, err := ask(cmd.Context(), state, path)
		if err != nil {
			name, b = name+".error", []byte(err.Error()+"\n")
			fmt.Fprintf(cmd.ErrOrStderr(), "without %s: %v\n", path[1:], err)
		}
		errs = append(errs, add(name, b))
	}
	asked, err := json.MarshalIndent(cfg, "", "  ")
	errs = append(errs, err, add("config-on-disk.json", asked), add("files.txt", listFiles(string(state))))
	errs = append(errs, add("version.txt", []byte(versionString()+"\n")), t.Close(), zip.Close())
	return errors.Join(errs...)
}

// listFiles lists names and sizes below dir.
func listFiles(dir string) []byte {
	var out []byte
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { // errors stand in the list
		if err != nil {
			out = fmt.Appendf(out, "%s: %v\n", path, err)
			return nil
		}
		if info, err := d.Info(); err == nil {
			out = fmt.Appendf(out, "%s %10d %s %s\n", info.Mode(), info.Size(), info.ModTime().UTC().Format(time.RFC3339), path)
		}
		return nil
	})
	return out
}

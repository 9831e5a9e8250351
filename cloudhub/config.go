package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
)

// envPrefix precedes the name of a flag, in capitals with '_' for '-', in the environment.
const envPrefix = "LONGSHORE_"

// configVariable names the configuration file. It is this command's own: the edge hub's file has other keys, and both may run on
// one machine.
const configVariable = envPrefix + "CLOUDHUB_CONFIG"

// config is the validated configuration of a hub.
type config struct {
	Source     string
	Manifests  string
	Kubeconfig string
	HubName    string
	Data       string

	MQTT, HTTP      string
	TLSCert, TLSKey string

	TokenFile, SigningKey string
	APITokenFile          string

	Models          string
	ModelCacheBytes bytesFlag

	RetentionAge   time.Duration
	RetentionBytes bytesFlag

	LogFormat, LogLevel string
}

// bytesFlag is a number of bytes, written as Kubernetes writes quantities: 500M, 4Gi.
type bytesFlag int64

func (b *bytesFlag) String() string {
	return resource.NewQuantity(int64(*b), resource.BinarySI).String()
}
func (b *bytesFlag) Type() string { return "bytes" }
func (b *bytesFlag) Set(s string) error {
	q, err := resource.ParseQuantity(s)
	if err != nil || q.Value() <= 0 {
		return errors.New("want a number of bytes such as 500M or 4Gi")
	}
	*b = bytesFlag(q.Value())
	return nil
}

// flags declares the settings of a hub. Each can also stand in the environment and in the YAML file, under the same name.
func (c *config) flags() *pflag.FlagSet {
	f := pflag.NewFlagSet("cloudhub", pflag.ContinueOnError)
	host, _ := os.Hostname()
	c.ModelCacheBytes, c.RetentionBytes = 8<<30, 4<<30
	f.StringVar(&c.Source, "source", "folder", "where specs come from: folder or kubernetes")
	f.StringVar(&c.Manifests, "manifests", "manifests", "`folder` of YAML files with Edges, Models, Pods, ConfigMaps, Secrets (source folder)")
	f.StringVar(&c.Kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty: $KUBECONFIG, or the service account of this pod (source kubernetes)")
	f.StringVar(&c.HubName, "hub-name", host, "name of this hub in Edge status; different for each hub of one cluster")
	f.StringVar(&c.Data, "data", "/var/lib/longshore-cloudhub", "`folder` of this hub's own: telemetry, token file, signing key, model cache")
	f.StringVar(&c.MQTT, "mqtt", "127.0.0.1:1883", "`address` for edges, MQTT")
	f.StringVar(&c.HTTP, "http", "127.0.0.1:8080", "`address` for model files, MQTT over WebSocket (/mqtt), the API, /metrics, /healthz and /readyz")
	f.StringVar(&c.TLSCert, "tls-cert", "", "certificate `file` (PEM) for both addresses")
	f.StringVar(&c.TLSKey, "tls-key", "", "private key `file` (PEM) of --tls-cert")
	f.StringVar(&c.TokenFile, "token-file", "", "`file` of enrolled edges (default tokens in --data)")
	f.StringVar(&c.SigningKey, "signing-key", "", "`file` of the key that signs what edges are told; the same for each hub of one cluster (default signing-key.pem in --data)")
	f.StringVar(&c.APITokenFile, "api-token-file", "", "`file` with the bearer token for /api/; needed when --http is not on loopback")
	f.StringVar(&c.Models, "models", "", "`folder` that relative file: addresses of models are below")
	f.Var(&c.ModelCacheBytes, "model-cache-bytes", "room for model files fetched over HTTP")
	f.DurationVar(&c.RetentionAge, "retention-age", 30*24*time.Hour, "how long telemetry is kept")
	f.Var(&c.RetentionBytes, "retention-bytes", "how much telemetry is kept")
	f.StringVar(&c.LogFormat, "log-format", "text", "text or json")
	f.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
	return f
}

// load fills the settings that the command line left out.
func load(settings *pflag.FlagSet, file string) error {
	if v, set := os.LookupEnv(configVariable); set && file == "" {
		file = v
	}
	if err := fill(settings, file, os.LookupEnv); err != nil {
		return usageError{err}
	}
	return nil
}

// fill sets the flags that the command line left out, from the environment, then from the YAML file at path ("" = none).
// Only flags are known: a misspelt key is an error that names the line.
func fill(f *pflag.FlagSet, path string, lookup func(string) (string, bool)) error {
	var errs []error
	f.VisitAll(func(flag *pflag.Flag) {
		name := envPrefix + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		value, set := lookup(name)
		if flag.Changed || !set {
			return
		}
		if err := f.Set(flag.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("environment %s=%q: %w", name, value, err))
		}
	})
	if path == "" {
		return errors.Join(errs...)
	}
	values, err := readYAML(path)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, v := range values {
		flag := f.Lookup(v.key)
		switch {
		case flag == nil:
			errs = append(errs, fmt.Errorf("%s:%d: unknown key %q: keys are the flags of cloudhub run --help without --", path, v.line, v.key))
		case !flag.Changed:
			if err := f.Set(v.key, v.value); err != nil {
				errs = append(errs, fmt.Errorf("%s:%d: %s: %w", path, v.line, v.key, err))
			}
		}
	}
	return errors.Join(errs...)
}

type yamlValue struct {
	key, value string
	line       int
}

// readYAML reads one mapping of scalars.
func readYAML(path string) ([]yamlValue, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(content, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(doc.Content) == 0 {
		return nil, nil
	}
	top := doc.Content[0]
	if top.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s:%d: want lines of \"key: value\"", path, top.Line)
	}
	var values []yamlValue
	for i := 0; i+1 < len(top.Content); i += 2 {
		k, v := top.Content[i], top.Content[i+1]
		if v.Kind != yaml.ScalarNode {
			return nil, fmt.Errorf("%s:%d: %s: want one value", path, v.Line, k.Value)
		}
		if slices.ContainsFunc(values, func(o yamlValue) bool { return o.key == k.Value }) {
			return nil, fmt.Errorf("%s:%d: %s is there twice", path, k.Line, k.Value)
		}
		values = append(values, yamlValue{k.Value, v.Value, k.Line})
	}
	return values, nil
}

// validate checks the configuration and fills in what follows from other values.
func (c *config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Source != "folder" && c.Source != "kubernetes" {
		bad("--source %q: want folder or kubernetes", c.Source)
	}
	if c.Source == "folder" && c.Manifests == "" {
		bad("--manifests is empty: name the folder of YAML files")
	}
	if c.Data == "" {
		bad("--data is empty: name a folder for this hub")
	}
	if c.HubName == "" {
		bad("--hub-name is empty, and this machine has no name")
	}
	for flag, address := range map[string]string{"--mqtt": c.MQTT, "--http": c.HTTP} {
		if _, _, err := net.SplitHostPort(address); err != nil {
			bad("%s %q: want host:port, such as 127.0.0.1:1883 (%w)", flag, address, err)
		}
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		bad("--tls-cert and --tls-key go together")
	}
	if c.APITokenFile == "" && !loopback(c.HTTP) {
		bad("--http %s can be reached from other machines: give --api-token-file a file with a long random token for /api/, or listen on 127.0.0.1", c.HTTP)
	}
	if c.RetentionAge <= 0 {
		bad("--retention-age %v: want a positive duration such as 720h", c.RetentionAge)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		bad("--log-format %q: want text or json", c.LogFormat)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		bad("--log-level %q: want debug, info, warn or error", c.LogLevel)
	}
	if len(errs) > 0 {
		return usageError{errors.Join(errs...)}
	}
	c.tokenFile()
	return nil
}

// tokenFile fills in the places of the token file and the signing key, which "edges enroll" needs as well.
func (c *config) tokenFile() {
	if c.TokenFile == "" {
		c.TokenFile = filepath.Join(c.Data, "tokens")
	}
	if c.SigningKey == "" {
		c.SigningKey = filepath.Join(c.Data, "signing-key.pem")
	}
}

// tls returns the server configuration, nil without a certificate.
func (c *config) tls() (*tls.Config, error) {
	if c.TLSCert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
	if err != nil {
		return nil, usagef("--tls-cert and --tls-key: %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, nil
}

// apiToken returns the token for /api/, empty for none.
func (c *config) apiToken() (string, error) {
	if c.APITokenFile == "" {
		return "", nil
	}
	return readToken(c.APITokenFile)
}

func readToken(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", usagef("--api-token-file: %w", err)
	}
	token := strings.TrimSpace(string(content))
	if len(token) < 16 {
		return "", usagef("--api-token-file %s: the token is shorter than 16 characters: make one with \"openssl rand -hex 32\"", path)
	}
	return token, nil
}

// logger writes to w as configured.
func (c *config) logger(w io.Writer) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.LogLevel)) // validate checked it
	options := &slog.HandlerOptions{Level: level}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// loopback reports whether an address can be reached from this machine alone.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}

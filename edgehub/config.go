package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"go.yaml.in/yaml/v3"

	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/outbox"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	defaultConfig = "/etc/longshore/edgehub.yaml"
	defaultState  = "/var/lib/longshore"
	// configVariable names the configuration file. It is this command's own: the cloud hub's file has other keys, and both may
	// run on one machine.
	configVariable = "LONGSHORE_EDGEHUB_CONFIG"
)

// Config is everything that can be set. It is one value, validated before anything starts.
type Config struct {
	State      string          `yaml:"state"`
	Credential string          `yaml:"credential"`
	Hub        HubConfig       `yaml:"hub"`
	Broker     BrokerConfig    `yaml:"broker"`
	HTTP       HTTPConfig      `yaml:"http"`
	Streams    []Stream        `yaml:"streams"`
	Models     ModelsConfig    `yaml:"models"`
	Telemetry  TelemetryConfig `yaml:"telemetry"`
	Memory     MemoryConfig    `yaml:"memory"`
	Log        LogConfig       `yaml:"log"`
}

// HubConfig says where the cloud hub is.
type HubConfig struct {
	URL   string `yaml:"url"`
	Files string `yaml:"files"`
	CA    string `yaml:"ca"`
}

// BrokerConfig is the door for devices.
type BrokerConfig struct {
	Listen         string `yaml:"listen"`
	AllowAnonymous Bool   `yaml:"allowAnonymous"`
	MaxConnections Int    `yaml:"maxConnections"`
}

// HTTPConfig is the door for inference, health, metrics and status.
type HTTPConfig struct {
	Listen         string `yaml:"listen"`
	AllowAnonymous Bool   `yaml:"allowAnonymous"`
}

// ModelsConfig is about models and their workers.
type ModelsConfig struct {
	Worker       string `yaml:"worker"`
	ORTLibrary   string `yaml:"ortLibrary"`
	DiskQuota    Bytes  `yaml:"diskQuota"`
	DownloadRate Bytes  `yaml:"downloadRate"`
	MemoryLimit  Bytes  `yaml:"memoryLimit"`
}

// TelemetryConfig is about the way up.
type TelemetryConfig struct {
	BacklogRate Bytes `yaml:"backlogRate"`
}

// MemoryConfig steers the Go runtime's garbage collector.
type MemoryConfig struct {
	Limit     Bytes `yaml:"limit"`
	GCPercent Int   `yaml:"gcPercent"`
}

// LogConfig is about the agent's own log.
type LogConfig struct {
	Format string `yaml:"format"`
	Level  string `yaml:"level"`
}

// Stream maps MQTT topics to a telemetry stream and bounds it. Without topics it only bounds a stream that models write to.
type Stream struct {
	Name     string   `yaml:"name"`
	Topics   []string `yaml:"topics"`
	MaxBytes Bytes    `yaml:"maxBytes"`
	MaxAge   Duration `yaml:"maxAge"`
	Policy   string   `yaml:"policy"`

	line int
}

// UnmarshalYAML checks a stream where its line is known. It looks for unknown keys itself: the decoder does not below an
// UnmarshalYAML.
func (s *Stream) UnmarshalYAML(n *yaml.Node) error {
	known := []string{"name", "topics", "maxBytes", "maxAge", "policy"}
	for i := 0; n.Kind == yaml.MappingNode && i < len(n.Content); i += 2 {
		if k := n.Content[i]; !slices.Contains(known, k.Value) {
			return fmt.Errorf("line %d: unknown key %q of a stream (known: %s)", k.Line, k.Value, strings.Join(known, ", "))
		}
	}
	type plain Stream
	if err := n.Decode((*plain)(s)); err != nil {
		return err
	}
	s.line = n.Line
	if err := s.validate(); err != nil {
		return fmt.Errorf("line %d: stream %q: %w", n.Line, s.Name, err)
	}
	return nil
}

func (s *Stream) validate() error {
	if err := frame.ValidStream(s.Name); err != nil {
		return err
	}
	for _, f := range s.Topics {
		if err := topic.ValidFilter(f); err != nil {
			return err
		}
		if strings.HasPrefix(f, "longshore/") || strings.HasPrefix(f, "$") {
			return fmt.Errorf("topic filter %q: longshore/ and $ are not for devices", f)
		}
	}
	if p := outbox.Policy(s.Policy); s.Policy != "" && p != outbox.DropOldest && p != outbox.Refuse {
		return fmt.Errorf("policy %q is neither %q nor %q", s.Policy, outbox.DropOldest, outbox.Refuse)
	}
	return nil
}

// Bytes is a size, written like "64MiB", or bytes per second.
type Bytes int64

// Set reads s.
func (b *Bytes) Set(s string) error {
	n, err := humanize.ParseBytes(strings.TrimSuffix(s, "/s"))
	if err != nil || n > 1<<62 {
		return fmt.Errorf("%q is not a size: write it like 500000, 64KiB, 10MB or 2GiB", s)
	}
	*b = Bytes(n)
	return nil
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (b *Bytes) UnmarshalYAML(n *yaml.Node) error { return atLine(n, b.Set) }

// Duration is a time span, written like "36h".
type Duration time.Duration

// Set reads s.
func (d *Duration) Set(s string) error {
	days, isDays := strings.CutSuffix(s, "d")
	if n, err := strconv.Atoi(days); isDays && err == nil && n >= 0 && n < 36500 {
		*d = Duration(time.Duration(n) * 24 * time.Hour)
		return nil
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a duration: write it like 90s, 36h or 7d", s)
	}
	*d = Duration(v)
	return nil
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error { return atLine(n, d.Set) }

// Bool is true or false.
type Bool bool

// Set reads s.
func (b *Bool) Set(s string) error {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return fmt.Errorf("%q is neither true nor false", s)
	}
	*b = Bool(v)
	return nil
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (b *Bool) UnmarshalYAML(n *yaml.Node) error { return atLine(n, b.Set) }

// Int is a whole number.
type Int int

// Set reads s.
func (i *Int) Set(s string) error {
	v, err := strconv.Atoi(s)
	if err != nil {
		return fmt.Errorf("%q is not a whole number", s)
	}
	*i = Int(v)
	return nil
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (i *Int) UnmarshalYAML(n *yaml.Node) error { return atLine(n, i.Set) }

func atLine(n *yaml.Node, set func(string) error) error {
	if err := set(n.Value); err != nil {
		return fmt.Errorf("line %d: %w", n.Line, err)
	}
	return nil
}

// setting is one value that a flag, an environment variable and the file can set. The key is that of the file.
type setting struct {
	key, usage string
	set        func(c *Config, s string) error
}

func text(at func(*Config) *string) func(*Config, string) error {
	return func(c *Config, s string) error {
		*at(c) = s
		return nil
	}
}

// settings are all values but the streams, which only the file can set.
func settings() []setting {
	return []setting{
		{"state", "folder for everything the agent keeps", text(func(c *Config) *string { return &c.State })},
		{"credential", "file with the edge's name, token and the hub's keys (from: cloudhub edges enroll)", text(func(c *Config) *string { return &c.Credential })},
		{"hub.url", "address of the hub's MQTT door: tcp://, tls://, ws:// or wss://", text(func(c *Config) *string { return &c.Hub.URL })},
		{"hub.files", "address of the hub's model files, http:// or https:// (default: derived from a ws:// or wss:// hub.url)", text(func(c *Config) *string { return &c.Hub.Files })},
		{"hub.ca", "PEM file of the authority that signed the hub's TLS certificate (default: the system's)", text(func(c *Config) *string { return &c.Hub.CA })},
		{"broker.listen", "address for devices (MQTT)", text(func(c *Config) *string { return &c.Broker.Listen })},
		{"broker.allowAnonymous", "let devices in without credentials also beyond this machine", func(c *Config, s string) error { return c.Broker.AllowAnonymous.Set(s) }},
		{"broker.maxConnections", "how many devices may be connected; each takes about 40 KiB", func(c *Config, s string) error { return c.Broker.MaxConnections.Set(s) }},
		{"http.listen", "address for inference, health, metrics and status", text(func(c *Config) *string { return &c.HTTP.Listen })},
		{"http.allowAnonymous", "let anybody infer and read status and metrics also from beyond this machine", func(c *Config, s string) error { return c.HTTP.AllowAnonymous.Set(s) }},
		{"models.worker", "worker program (default: longshore-worker beside this program)", text(func(c *Config) *string { return &c.Models.Worker })},
		{"models.ortLibrary", "libonnxruntime.so.1 (default: searched in the usual places)", text(func(c *Config) *string { return &c.Models.ORTLibrary })},
		{"models.diskQuota", "bound of all model files", func(c *Config, s string) error { return c.Models.DiskQuota.Set(s) }},
		{"models.downloadRate", "bound of model downloads per second; 0 is none", func(c *Config, s string) error { return c.Models.DownloadRate.Set(s) }},
		{"models.memoryLimit", "memory of a worker whose model names none", func(c *Config, s string) error { return c.Models.MemoryLimit.Set(s) }},
		{"telemetry.backlogRate", "bound of the backlog lane per second; 0 is none", func(c *Config, s string) error { return c.Telemetry.BacklogRate.Set(s) }},
		{"memory.limit", "soft bound of the agent's own memory (GOMEMLIMIT wins); 0 is none", func(c *Config, s string) error { return c.Memory.Limit.Set(s) }},
		{"memory.gcPercent", "garbage collector's target (GOGC wins)", func(c *Config, s string) error { return c.Memory.GCPercent.Set(s) }},
		{"log.format", "text or json", text(func(c *Config) *string { return &c.Log.Format })},
		{"log.level", "debug, info, warn or error", text(func(c *Config) *string { return &c.Log.Level })},
	}
}

// kebab turns a key into words: "models.ortLibrary" into "models-ort-library".
func kebab(key string) string {
	var b strings.Builder
	for i := range len(key) {
		c := key[i]
		switch {
		case c == '.':
			b.WriteByte('-')
		case c >= 'A' && c <= 'Z':
			if p := key[i-1]; p < 'A' || p > 'Z' {
				b.WriteByte('-')
			}
			b.WriteByte(c + 'a' - 'A')
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

func (s setting) flag() string { return kebab(s.key) }

func (s setting) env() string {
	return "LONGSHORE_" + strings.ToUpper(strings.ReplaceAll(kebab(s.key), "-", "_"))
}

func defaults() Config {
	return Config{
		State:     defaultState,
		Broker:    BrokerConfig{Listen: "127.0.0.1:1883", MaxConnections: 10_000},
		HTTP:      HTTPConfig{Listen: "127.0.0.1:8090"},
		Models:    ModelsConfig{DiskQuota: 2 << 30, MemoryLimit: 512 << 20},
		Telemetry: TelemetryConfig{BacklogRate: 1 << 20},
		Memory:    MemoryConfig{Limit: 48 << 20, GCPercent: 50},
		Log:       LogConfig{Format: "text", Level: "info"},
	}
}

// loadConfig makes one configuration from defaults, file, environment and flags, each winning over those before it. An
// empty file means the default one if it is there. It does not validate.
func loadConfig(file string, env func(string) (string, bool), flags map[string]string) (Config, error) {
	c := defaults()
	optional := file == ""
	if optional {
		file = defaultConfig
	}
	b, err := os.ReadFile(file)
	switch {
	case err == nil:
		if err := decodeYAML(b, &c); err != nil {
			return c, fmt.Errorf("configuration %s: %w", file, err)
		}
	case !optional || !errors.Is(err, fs.ErrNotExist):
		return c, fmt.Errorf("read configuration: %w", err)
	}
	for _, s := range settings() {
		if v, ok := env(s.env()); ok {
			if err := s.set(&c, v); err != nil {
				return c, fmt.Errorf("environment variable %s: %w", s.env(), err)
			}
		}
		if v, ok := flags[s.flag()]; ok {
			if err := s.set(&c, v); err != nil {
				return c, fmt.Errorf("flag --%s: %w", s.flag(), err)
			}
		}
	}
	return c, nil
}

// decodeYAML decodes one document strictly; errors name the line.
func decodeYAML(b []byte, into any) error {
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	err := d.Decode(into)
	var te *yaml.TypeError
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case errors.As(err, &te):
		lines := make([]string, len(te.Errors))
		for i, l := range te.Errors {
			if at, rest, ok := strings.Cut(l, ": field "); ok {
				key, _, _ := strings.Cut(rest, " ")
				l = fmt.Sprintf("%s: unknown key %q", at, key)
			}
			lines[i] = l
		}
		return errors.New(strings.Join(lines, "; "))
	case err != nil:
		return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	return nil
}

// validate checks everything that can be checked without opening anything, and fills in what follows from the rest.
func (c *Config) validate() error {
	if c.Credential == "" {
		return errors.New("credential is not set: make one on the hub with `cloudhub edges enroll NAME -o FILE`, bring the file here and set credential (--credential FILE)")
	}
	if c.Hub.URL == "" {
		return errors.New("hub.url is not set: set it to the hub's MQTT door, such as wss://hub.example.org/mqtt (--hub-url)")
	}
	if err := c.validateHub(); err != nil {
		return err
	}
	for key, addr := range map[string]string{"broker.listen": c.Broker.Listen, "http.listen": c.HTTP.Listen} {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("%s: %q is not host:port", key, addr)
		}
	}
	if !loopback(c.Broker.Listen) && !bool(c.Broker.AllowAnonymous) {
		return fmt.Errorf("broker.listen: %s is beyond this machine and devices need no credentials there: listen on 127.0.0.1, or set broker.allowAnonymous to true (--broker-allow-anonymous) if the network is yours alone", c.Broker.Listen)
	}
	if c.Broker.MaxConnections < 1 {
		return fmt.Errorf("broker.maxConnections: %d lets no device in", c.Broker.MaxConnections)
	}
	if !loopback(c.HTTP.Listen) && !bool(c.HTTP.AllowAnonymous) {
		return fmt.Errorf("http.listen: %s is beyond this machine, and whoever reaches it may infer and read status and metrics without credentials: listen on 127.0.0.1, or set http.allowAnonymous to true (--http-allow-anonymous) if the network is yours alone", c.HTTP.Listen)
	}
	seen := map[string]int{}
	for _, s := range c.Streams {
		if line, ok := seen[s.Name]; ok {
			return fmt.Errorf("line %d: stream %q is already there in line %d", s.line, s.Name, line)
		}
		seen[s.Name] = s.line
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		return fmt.Errorf("log.format: %q is neither text nor json", c.Log.Format)
	}
	if err := new(slog.Level).UnmarshalText([]byte(c.Log.Level)); err != nil {
		return fmt.Errorf("log.level: %q is none of debug, info, warn and error", c.Log.Level)
	}
	if c.Models.Worker == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find the worker program: %w: set models.worker", err)
		}
		c.Models.Worker = filepath.Join(filepath.Dir(self), "longshore-worker")
	}
	var err error
	if c.State, err = filepath.Abs(c.State); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

func (c *Config) validateHub() error {
	u, err := url.Parse(c.Hub.URL)
	if err != nil || u.Host == "" {
		return fmt.Errorf("hub.url: %q is not an address like tcp://host:1883 or wss://host/mqtt", c.Hub.URL)
	}
	if u.User != nil {
		return errors.New("hub.url must not contain a user or password: the credential file has them")
	}
	files := map[string]string{"tcp": "", "tls": "", "ws": "http", "wss": "https"}
	scheme, ok := files[u.Scheme]
	if !ok {
		return fmt.Errorf("hub.url: scheme %q is none of tcp, tls, ws and wss", u.Scheme)
	}
	if c.Hub.Files == "" && scheme != "" {
		c.Hub.Files = scheme + "://" + u.Host
	}
	if c.Hub.Files == "" {
		return nil
	}
	f, err := url.Parse(c.Hub.Files)
	if err != nil || f.Host == "" || f.Scheme != "http" && f.Scheme != "https" || f.User != nil {
		return fmt.Errorf("hub.files: %q is not an address like https://host", c.Hub.Files)
	}
	return nil
}

func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// quotas for the outbox.
func (c *Config) quotas() map[string]outbox.Quota {
	q := map[string]outbox.Quota{}
	for _, s := range c.Streams {
		q[s.Name] = outbox.Quota{MaxBytes: int64(s.MaxBytes), MaxAge: time.Duration(s.MaxAge), Policy: outbox.Policy(s.Policy)}
	}
	return q
}

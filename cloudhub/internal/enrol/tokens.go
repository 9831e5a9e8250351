package enrol

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/sync/durable"
	"github.com/longshore-edge/longshore/sync/topic"
)

// tokenBytes is the size of a token before encoding: 256 bits.
const tokenBytes = 32

// ErrEnrolled says that an edge has a token already.
var ErrEnrolled = errors.New("is enrolled already")

const (
	// settle is how long the file is left alone after a change: an editor writes it in several steps.
	settle = 200 * time.Millisecond
	// rescan finds what no notification told of, such as changes on network file systems.
	rescan = 10 * time.Second
)

// Tokens is the file of enrolled edges: a line per edge, its name and the SHA-256 of its token in hexadecimal. The file is
// read again whenever it changed, so that enrolling and revoking need no restart. While it is broken, what was good before
// stays in force. Safe for concurrent use.
type Tokens struct {
	path   string
	log    *slog.Logger
	access func(edge string) broker.Access
	change chan struct{} // 1 slot: keys changed

	mu   sync.Mutex
	seen fs.FileInfo // as last read; nil if there was no file
	err  error       // why it could not be read then
	keys map[string][sha256.Size]byte
}

// OpenTokens reads the file; one that does not exist yet counts as empty. access gives the rights of an edge.
func OpenTokens(path string, log *slog.Logger, access func(edge string) broker.Access) (*Tokens, error) {
	t := &Tokens{path: path, log: log, access: access, change: make(chan struct{}, 1), keys: map[string][sha256.Size]byte{}}
	if err := t.read(); err != nil {
		return nil, err
	}
	return t, nil
}

// Run follows the file until ctx ends and calls changed after every change of who is enrolled.
func (t *Tokens) Run(ctx context.Context, changed func()) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the token file: %w", err)
	}
	defer func() { _ = w.Close() }()
	if err := w.Add(filepath.Dir(t.path)); err != nil {
		t.log.Warn("the token file cannot be watched, it is read every few seconds", "file", t.path, "err", err)
	}
	tick := time.NewTicker(rescan)
	defer tick.Stop()
	var settled <-chan time.Time
	stale := false // changed has not been called since the last change
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.Events:
			if settled == nil {
				settled = time.After(settle)
			}
		case err := <-w.Errors:
			t.log.Warn("watching the token file failed, it is read every few seconds", "file", t.path, "err", err)
		case <-settled:
			settled = nil
			t.refresh(false)
			if stale {
				stale = false
				changed()
			}
		case <-tick.C:
			t.refresh(true)
		case <-t.change: // a login may have seen the file half written: that must not close a fleet's connections
			stale = true
			if settled == nil {
				settled = time.After(settle)
			}
		}
	}
}

// Current reports whether an identity is still that of an enrolled edge, by the file as last read.
func (t *Tokens) Current(id broker.Identity) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	key, enrolled := t.keys[id.Name]
	return enrolled && bytes.Equal(key[:], id.Key)
}

// Err says what is wrong with the file as last read, nil if nothing is.
func (t *Tokens) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

var _ broker.Authenticator = (*Tokens)(nil)

// Authenticate implements broker.Authenticator: the user name is the edge's name, the password its token.
func (t *Tokens) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	return t.identify(l.Username, string(l.Password))
}

// Bearer returns the edge that an HTTP request proves to come from: "Authorization: Bearer <edge>:<token>".
func (t *Tokens) Bearer(r *http.Request) (broker.Identity, error) {
	text, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return broker.Identity{}, errors.New("no bearer token")
	}
	edge, token, _ := strings.Cut(text, ":")
	return t.identify(edge, token)
}

func (t *Tokens) identify(edge, token string) (broker.Identity, error) {
	if topic.ValidEdge(edge) != nil {
		// What was presented may be a token in the wrong place, so it is not repeated.
		return broker.Identity{}, errors.New("the name presented is not one of an edge")
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(raw) != tokenBytes {
		return broker.Identity{}, fmt.Errorf("edge %q presented no token of 256 bits", edge)
	}
	t.refresh(false)
	key := sha256.Sum256(raw)
	t.mu.Lock()
	want, enrolled := t.keys[edge]
	t.mu.Unlock()
	if !enrolled {
		return broker.Identity{}, fmt.Errorf("edge %q is not enrolled", edge)
	}
	// Comparing hashes of a random 256-bit secret leaks nothing that helps to find it.
	if key != want {
		return broker.Identity{}, fmt.Errorf("edge %q presented a wrong token", edge)
	}
	return broker.Identity{Name: edge, Key: key[:], Access: t.access(edge)}, nil
}

// refresh reads the file if it looks changed, or in any case. What is wrong with it is logged once per change.
func (t *Tokens) refresh(always bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	st, err := os.Stat(t.path)
	same := err == nil && t.seen != nil && os.SameFile(st, t.seen) && st.ModTime().Equal(t.seen.ModTime()) && st.Size() == t.seen.Size()
	if same && !always {
		return
	}
	before := t.err
	err = t.read()
	switch {
	case err != nil && (!same || before == nil || before.Error() != err.Error()):
		t.log.Error("the token file is broken: who was enrolled before it broke stays enrolled, nobody is added or revoked", "err", err)
	case err == nil && before != nil:
		t.log.Info("the token file is good again", "file", t.path, "edges", len(t.keys))
	}
}

// read takes the file over; after an error the earlier tokens stand. The caller holds mu, or is the only one.
func (t *Tokens) read() error {
	var keys map[string][sha256.Size]byte
	st, err := os.Stat(t.path)
	if err == nil {
		keys, err = readTokens(t.path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		st, keys, err = nil, map[string][sha256.Size]byte{}, nil
	}
	t.seen, t.err = st, err
	if err != nil || maps.Equal(keys, t.keys) {
		return err
	}
	t.keys = keys
	select {
	case t.change <- struct{}{}:
	default:
	}
	return nil
}

func readTokens(path string) (map[string][sha256.Size]byte, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read token file: %w", err)
	}
	keys, err := parseTokens(content)
	if err != nil {
		return nil, fmt.Errorf("token file %s: %w", path, err)
	}
	return keys, nil
}

func parseTokens(content []byte) (map[string][sha256.Size]byte, error) {
	keys := map[string][sha256.Size]byte{}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 2 {
			return nil, fmt.Errorf("line %d: want \"<edge> <sha256 in hexadecimal>\"", n)
		}
		if err := topic.ValidEdge(f[0]); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		key, err := hex.DecodeString(f[1])
		if err != nil || len(key) != sha256.Size {
			return nil, fmt.Errorf("line %d: the hash of edge %s is not 64 hexadecimal digits", n, f[0])
		}
		if _, twice := keys[f[0]]; twice {
			return nil, fmt.Errorf("line %d: edge %s is there twice", n, f[0])
		}
		keys[f[0]] = [sha256.Size]byte(key)
	}
	return keys, lines.Err()
}

// Enroll makes a token for an edge and adds its hash to the file, whether or not a hub runs. An edge that has a token
// already is ErrEnrolled, unless replace is set: then its old token ends.
func Enroll(path, edge string, replace bool) (token string, err error) {
	if err := topic.ValidEdge(edge); err != nil {
		return "", err
	}
	unlock, err := lockFile(path + ".lock")
	if err != nil {
		return "", fmt.Errorf("lock token file: %w", err)
	}
	defer unlock()
	content, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read token file: %w", err)
	}
	keys, err := parseTokens(content)
	if err != nil {
		return "", fmt.Errorf("token file %s: %w", path, err)
	}
	lines := strings.Split(strings.TrimRight(string(content), "\n"), "\n")
	if _, enrolled := keys[edge]; enrolled {
		if !replace {
			return "", fmt.Errorf("edge %s %w", edge, ErrEnrolled)
		}
		lines = slices.DeleteFunc(lines, func(l string) bool { f := strings.Fields(l); return len(f) == 2 && f[0] == edge })
	}
	raw := make([]byte, tokenBytes)
	rand.Read(raw)
	hash := sha256.Sum256(raw)
	lines = append(lines, edge+" "+hex.EncodeToString(hash[:]))
	text := strings.TrimLeft(strings.Join(lines, "\n")+"\n", "\n")
	if err := durable.WriteFile(path, []byte(text)); err != nil {
		return "", fmt.Errorf("write token file: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(raw), nil
}

// lockFile waits for an exclusive lock.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

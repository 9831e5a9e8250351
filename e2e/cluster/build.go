package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// ldflags give the control plane the version that it claims; without them kubectl version fails.
const ldflags = "-s -w" +
	" -X k8s.io/component-base/version.gitVersion=v1.37.2" +
	" -X k8s.io/component-base/version.gitMajor=1" +
	" -X k8s.io/component-base/version.gitMinor=37"

// progressEvery is how often a build says how far it is.
const progressEvery = 10 * time.Second

// Binary returns the path of the control plane's binary, building it if this machine's cache does not have it. A first
// build takes up to a quarter of an hour, of which progress is told; processes that ask at the same time wait for one build.
// The cache folder is $LONGSHORE_CACHE, or longshore below the user's cache folder. Call it from inside the repository.
func Binary(ctx context.Context, progress io.Writer) (string, error) {
	source, err := sourceDir(ctx)
	if err != nil {
		return "", err
	}
	key, err := cacheKey(source)
	if err != nil {
		return "", fmt.Errorf("hash the control plane's sources: %w", err)
	}
	dir, err := cacheDir()
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "controlplane-"+key)
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}

	lock, err := os.OpenFile(filepath.Join(dir, "controlplane.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := waitLock(ctx, lock, progress); err != nil {
		return "", fmt.Errorf("wait for another build of the control plane: %w", err)
	}
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}
	if err := build(ctx, source, binary, progress); err != nil {
		return "", fmt.Errorf("build the control plane: %w", err)
	}
	return binary, removeOthers(dir, binary)
}

func sourceDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	source := filepath.Join(filepath.Dir(strings.TrimSpace(string(out))), "e2e", "controlplane")
	if _, err := os.Stat(filepath.Join(source, "go.mod")); err != nil {
		return "", fmt.Errorf("run this inside the Longshore repository: %w", err)
	}
	return source, nil
}

func cacheDir() (string, error) {
	dir := os.Getenv("LONGSHORE_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("%w; set LONGSHORE_CACHE to a folder", err)
		}
		dir = filepath.Join(user, "longshore")
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// cacheKey changes with everything the binary is made of.
func cacheKey(source string) (string, error) {
	files, err := filepath.Glob(filepath.Join(source, "*.go"))
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOOS, runtime.GOARCH, ldflags)
	for _, file := range append(files, filepath.Join(source, "go.mod"), filepath.Join(source, "go.sum")) {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %x\n", filepath.Base(file), sha256.Sum256(b))
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// waitLock takes an exclusive lock, which ends with the file or the process.
func waitLock(ctx context.Context, lock *os.File, progress io.Writer) error {
	for told := false; ; told = true {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		if !told {
			fmt.Fprintln(progress, "another process builds the control plane: waiting for it")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func build(ctx context.Context, source, binary string, progress io.Writer) error {
	fmt.Fprintln(progress, "building the Kubernetes control plane for tests: once per machine, up to 15 minutes")
	env := append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	list := exec.CommandContext(ctx, "go", "list", "-deps", ".")
	list.Dir, list.Env = source, env
	packages, err := list.Output()
	if err != nil {
		return fmt.Errorf("go list: %w: %s", err, stderrOf(err))
	}
	total := bytes.Count(packages, []byte("\n"))

	staged := binary + ".new"
	cmd := exec.CommandContext(ctx, "go", "build", "-v", "-trimpath", "-ldflags", ldflags, "-o", staged, ".")
	cmd.Dir, cmd.Env = source, env
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	// go build -v names each package that it has to compile: those found in Go's own build cache are not named.
	begin, told, compiled := time.Now(), time.Now(), 0
	var tail []string
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		compiled++
		if tail = append(tail, lines.Text()); len(tail) > 20 {
			tail = tail[1:]
		}
		if time.Since(told) >= progressEvery {
			told = time.Now()
			fmt.Fprintf(progress, "building the control plane: %d of at most %d packages, %s\n", compiled, total, time.Since(begin).Round(time.Second))
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go build: %w:\n%s", err, strings.Join(tail, "\n"))
	}
	fmt.Fprintf(progress, "built the control plane in %s\n", time.Since(begin).Round(time.Second))
	return os.Rename(staged, binary)
}

func stderrOf(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(exit.Stderr)
	}
	return ""
}

// removeOthers deletes binaries of other sources: each takes 160 MB.
func removeOthers(dir, keep string) error {
	old, err := filepath.Glob(filepath.Join(dir, "controlplane-*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if path != keep {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkKubectl returns the path of a kubectl that fits the control plane: the same binary under that name.
func linkKubectl(binary string) (string, error) {
	path := filepath.Join(filepath.Dir(binary), "bin", "kubectl")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	mine := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Symlink(binary, mine); err != nil {
		return "", err
	}
	return path, os.Rename(mine, path)
}

// Longshore-worker serves one model by the Open Inference Protocol v2 on a Unix socket.
//
// The edge hub starts one worker for each model, so that a model that crashes, hangs or grows takes nothing else down.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exit codes.
const (
	exitUsage  = 2
	exitFailed = 3 // with a line of JSON on standard output
	exitOther  = 1
)

const usage = `longshore-worker serves one model by the Open Inference Protocol v2, HTTP on a Unix socket.

  longshore-worker --model bearing.onnx --name bearing --version 2 --socket /tmp/bearing.sock
  curl --unix-socket /tmp/bearing.sock http://worker/v2/models/bearing

Standard output is for the program that started it, one line of JSON each:
  {"ready":true,"engine":"onnxruntime","engineVersion":"1.24.1"}   loaded, and one inference on zeros succeeded
  {"reason":"LoadFailed","message":"…"}                            then it exits with code 3; the reasons are
                                                                   LoadFailed, NoEngine and OutOfMemory
The log goes to standard error. It ends with code 0 on SIGTERM or SIGINT, when the pipe on its standard input is closed,
and is killed when its parent dies.

Engines: onnxruntime needs the library libonnxruntime.so.1 ("make onnxruntime" gets it), looked for at --ort-library,
$LONGSHORE_ORT, beside this program, in $LONGSHORE_CACHE/onnxruntime (~/.cache/longshore/onnxruntime), and where the
dynamic linker looks; gomlx is built in, slower, and knows fewer operators. auto prefers onnxruntime.

Flags:
`

func main() {
	// Libraries print to standard output, which belongs to the parent's protocol.
	report := os.Stdout
	os.Stdout = os.Stderr
	os.Exit(command(os.Args[1:], report, os.Stderr))
}

func command(args []string, report io.Writer, stderr io.Writer) int {
	log := slog.New(slog.NewTextHandler(stderr, nil))
	cfg, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "longshore-worker: %v (--help explains)\n", err)
		return exitUsage
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		log.Error("can't bind life to the parent's", "error", err)
		return exitOther
	}
	if err := limitMemory(cfg.memoryLimit); err != nil {
		log.Error("worker ends", "error", err)
		return exitOther
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	endWithInput(os.Stdin, cancel)

	err = run(ctx, cfg, log, report)
	if f, ok := errors.AsType[*failure](err); ok {
		log.Error("worker ends", "reason", f.Reason, "error", f.Message)
		// The line is for a parent; without one there is the log.
		_ = json.NewEncoder(report).Encode(f)
		return exitFailed
	}
	if err != nil {
		log.Error("worker ends", "error", err)
		return exitOther
	}
	return 0
}

func parse(args []string, stderr io.Writer) (config, error) {
	var cfg config
	flags := flag.NewFlagSet("longshore-worker", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	flags.StringVar(&cfg.model, "model", "", "`file` of the model")
	flags.StringVar(&cfg.format, "format", "onnx", "format of the file; onnx is the only one")
	flags.StringVar(&cfg.name, "name", "", "`name` of the model, as in /v2/models/NAME")
	flags.StringVar(&cfg.version, "version", "", "`version` of the model")
	flags.StringVar(&cfg.socket, "socket", "", "`path` of the Unix socket, at most 107 bytes; an old socket there is replaced")
	flags.StringVar(&cfg.engine, "engine", "auto", "auto, onnxruntime or gomlx")
	flags.StringVar(&cfg.ortLibrary, "ort-library", "", "`path` of libonnxruntime.so.1")
	flags.Int64Var(&cfg.memoryLimit, "memory-limit", 512<<20, "resident memory in `bytes`; a worker that grows beyond ends as OutOfMemory")
	flags.Int64Var(&cfg.maxRequest, "max-request", 16<<20, "size of a request in `bytes`")
	flags.IntVar(&cfg.threads, "threads", 1, "threads of one inference")
	if err := flags.Parse(args); err != nil {
		return cfg, err
	}
	for name, value := range map[string]string{"model": cfg.model, "name": cfg.name, "version": cfg.version, "socket": cfg.socket} {
		if value == "" {
			return cfg, fmt.Errorf("--%s is needed", name)
		}
	}
	const minMemory, maxSocket = 32 << 20, 107
	switch {
	case flags.NArg() > 0:
		return cfg, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case cfg.engine != "auto" && cfg.engine != "onnxruntime" && cfg.engine != "gomlx":
		return cfg, fmt.Errorf("--engine is %q, not auto, onnxruntime or gomlx", cfg.engine)
	case cfg.memoryLimit < minMemory:
		return cfg, fmt.Errorf("--memory-limit is %d bytes; a worker needs at least %d", cfg.memoryLimit, int64(minMemory))
	case cfg.maxRequest < 1 || cfg.maxRequest > cfg.memoryLimit:
		return cfg, fmt.Errorf("--max-request is %d; it must be positive and no more than --memory-limit", cfg.maxRequest)
	case cfg.threads < 1 || cfg.threads > 64:
		return cfg, fmt.Errorf("--threads is %d, not 1 to 64", cfg.threads)
	case strings.ContainsAny(cfg.name+cfg.version, "/"):
		return cfg, errors.New("--name and --version are parts of a path and can't have a slash")
	case len(cfg.socket) > maxSocket:
		return cfg, fmt.Errorf("--socket has %d bytes; Linux allows %d", len(cfg.socket), maxSocket)
	}
	return cfg, nil
}

// endWithInput calls end when in is a pipe or socket whose other side is closed: the parent is gone. The goroutine
// lives as long as the process, since a read from a pipe can't be interrupted portably.
func endWithInput(in *os.File, end func()) {
	info, err := in.Stat()
	if err != nil || info.Mode().Type()&(fs.ModeNamedPipe|fs.ModeSocket) == 0 {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		end()
	}()
}

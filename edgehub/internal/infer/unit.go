package infer

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// unit is what one worker serves: a variant of a version of a model.
type unit struct {
	namespace, name, version string
	variant                  string
	digest                   string
	size                     int64
	engine                   string // as the worker's flag takes it
	memory                   int64  // limit in bytes
}

// id tells whether a worker must be replaced: bindings and names of variants don't matter to it.
func (u unit) id() string {
	return fmt.Sprintf("%s|%s|%s|%d", u.version, u.digest, u.engine, u.memory)
}

func makeUnit(spec *longshorepb.Model, v *longshorepb.ModelVariant, defaultMemory int64) unit {
	u := unit{
		namespace: spec.GetNamespace(), name: spec.GetName(), version: spec.GetVersion(), variant: v.GetName(),
		digest: v.GetDigest(), size: int64(v.GetSizeBytes()),
		engine: v.GetRequires().GetEngine(), memory: int64(v.GetRequires().GetMemoryBytes()),
	}
	if u.engine == "" {
		u.engine = "auto"
	}
	if u.memory == 0 {
		u.memory = defaultMemory
	}
	return u
}

// specHash identifies a spec: a version that failed is tried again when any of it changed.
func specHash(spec *longshorepb.Model) string {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec)
	if err != nil { // invalid UTF-8 can't have come over the wire
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// engines this machine has.
type engines struct {
	ort     bool
	library string // of ONNX Runtime; empty where the dynamic linker finds it
	gomlx   bool
}

// ortName is the file name of ONNX Runtime's library.
const ortName = "libonnxruntime.so.1"

// findEngines looks for ONNX Runtime where the worker does, so that a variant is not downloaded in vain.
func findEngines(cfg Config) engines {
	e := engines{gomlx: cfg.Arch != "arm"}
	for _, named := range []string{cfg.ORTLibrary, os.Getenv("LONGSHORE_ORT")} {
		if named != "" {
			e.ort, e.library = isFile(named), named
			return e
		}
	}
	dirs := []string{filepath.Dir(cfg.Worker)}
	if cache := os.Getenv("LONGSHORE_CACHE"); cache != "" {
		dirs = append(dirs, filepath.Join(cache, "onnxruntime"))
	} else if cache, err := os.UserCacheDir(); err == nil {
		dirs = append(dirs, filepath.Join(cache, "longshore", "onnxruntime"))
	}
	for _, d := range dirs {
		if p := filepath.Join(d, ortName); isFile(p) {
			e.ort, e.library = true, p
			return e
		}
	}
	// What the dynamic linker knows: ld.so(8).
	linker := append(filepath.SplitList(os.Getenv("LD_LIBRARY_PATH")), "/lib", "/usr/lib")
	e.ort = slices.ContainsFunc(linker, func(d string) bool { return isFile(filepath.Join(d, ortName)) })
	if cache, err := os.ReadFile("/etc/ld.so.cache"); err == nil {
		e.ort = e.ort || bytes.Contains(cache, []byte(ortName+"\x00"))
	}
	return e
}

// lacks says why an engine is not to be had, "" if it is. An empty engine stands for any.
func (e engines) lacks(engine string) string {
	switch engine {
	case "onnxruntime":
		if !e.ort {
			return "ONNX Runtime's library is not on this machine (set models.ortLibrary, or put libonnxruntime.so.1 beside the worker)"
		}
	case "gomlx":
		if !e.gomlx {
			return "GoMLX does not run on this architecture"
		}
	case "":
		if !e.ort && !e.gomlx {
			return "no engine: GoMLX does not run on this architecture, and ONNX Runtime's library is not on this machine"
		}
	default:
		return fmt.Sprintf("engine %q is not known", engine)
	}
	return ""
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// machineMemory returns the memory of this machine in bytes, 0 if unknown.
func machineMemory() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0
			}
			return kib << 10
		}
	}
	return 0
}

// choose returns the first variant whose requirements this machine meets. without names the engines (by variant digest)
// that a worker found to be unusable.
func (m *Manager) choose(spec *longshorepb.Model, without map[string]string) (unit, *failure) {
	reason := reasonNoVariant
	var why []string
	for _, v := range spec.GetVariants() {
		req := v.GetRequires()
		obstacle := ""
		_, digestErr := fileName(v.GetDigest())
		switch {
		case v.GetFormat() != "onnx":
			obstacle = fmt.Sprintf("format %q is not known", v.GetFormat())
		case digestErr != nil:
			obstacle = digestErr.Error()
		case v.GetSizeBytes() == 0 || int64(v.GetSizeBytes()) < 0:
			obstacle = fmt.Sprintf("a size of %d bytes is not possible", v.GetSizeBytes())
		case req.GetArch() != "" && req.GetArch() != m.cfg.Arch:
			obstacle = fmt.Sprintf("needs %s, this machine is %s", req.GetArch(), m.cfg.Arch)
		case m.memory > 0 && req.GetMemoryBytes() > uint64(m.memory):
			obstacle = fmt.Sprintf("needs %d bytes of memory, this machine has %d", req.GetMemoryBytes(), m.memory)
		default:
			if obstacle = m.engines.lacks(req.GetEngine()); obstacle == "" {
				obstacle = without[v.GetDigest()+"|"+req.GetEngine()]
			}
			if obstacle == "" {
				return makeUnit(spec, v, m.cfg.MemoryLimit), nil
			}
			reason = reasonNoEngine
		}
		why = append(why, fmt.Sprintf("variant %q: %s", v.GetName(), obstacle))
	}
	if len(why) == 0 {
		why = []string{"the model has no variants"}
	}
	return unit{}, &failure{reason, strings.Join(why, "; ")}
}

package main

import (
	"bufio"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/space"
)

// maxPods is what the edge tells the scheduler it takes, Kubernetes' own default for a node.
const maxPods = 110

// describeNode reads what does not change while the agent runs. What cannot be read stays empty: it only informs.
func describeNode(containerRuntime string) *longshorepb.NodeReport {
	n := &longshorepb.NodeReport{
		Os: runtime.GOOS, Architecture: runtime.GOARCH, OsImage: osImage(),
		MachineId: firstLine("/etc/machine-id"), BootId: firstLine("/proc/sys/kernel/random/boot_id"),
		Kernel: firstLine("/proc/sys/kernel/osrelease"), AgentVersion: versionString(),
		CpuMillis: uint64(runtime.NumCPU()) * 1000, MaxPods: maxPods, Runtime: containerRuntime,
	}
	n.Hostname, _ = os.Hostname()
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		n.MemoryBytes = uint64(info.Totalram) * uint64(info.Unit)
	}
	return n
}

func firstLine(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line)
}

// osImage reads the system's name as os-release(5) has it.
func osImage() string {
	f, err := os.Open("/etc/os-release")
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "PRETTY_NAME="); ok {
			return strings.Trim(v, `"'`)
		}
	}
	return ""
}

// diskOf returns size and free bytes of the file system that holds dir; zeros if it cannot be read.
func diskOf(dir string) (size, free uint64) {
	f, s, err := space.Of(dir)
	if err != nil {
		return 0, 0
	}
	return uint64(s), uint64(f)
}

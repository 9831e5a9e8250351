package manifest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

const benchPod = `apiVersion: v1
kind: Pod
metadata:
  name: pod-%d
  namespace: plant
  labels: {app: reader, line: "%d"}
spec:
  nodeName: dock-%d
  containers:
  - name: reader
    image: registry.example.com/plant/reader:1.4.2
    args: ["--interval", "500ms"]
    env:
    - name: LINE
      value: "%d"
    - name: TOKEN
      valueFrom: {secretKeyRef: {name: reader, key: token}}
    resources:
      requests: {cpu: 50m, memory: 32Mi}
      limits: {memory: 64Mi}
    volumeMounts:
    - name: settings
      mountPath: /etc/reader
  volumes:
  - name: settings
    configMap: {name: reader}
`

// BenchmarkStart starts a hub's source on a folder of 10,000 pods in 100 files: until it is ready, no edge is told anything.
func BenchmarkStart(b *testing.B) {
	dir := b.TempDir()
	for f := range 100 {
		var text bytes.Buffer
		for n := range 100 {
			fmt.Fprintf(&text, "---\n"+benchPod, 100*f+n, f, f, n)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("line-%d.yaml", f)), text.Bytes(), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		f := start(b, dir, b.TempDir())
		if p := f.source.Problems(); len(p) > 0 {
			b.Fatal(p)
		}
		f.stop()
	}
}

package manifest

import (
	"bytes"
	"crypto/sha256"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	yamlv2 "go.yaml.in/yaml/v2"
	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/json"
	kyaml "sigs.k8s.io/yaml"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
)

// Problem is what is wrong with a file.
type Problem struct {
	// File is the path below the folder; Line counts from 1.
	File   string
	Line   int
	Reason string
}

func (p Problem) String() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Reason) }

// ref names an object of the folder.
type ref struct{ kind, namespace, name string }

func (r ref) String() string {
	if r.namespace == "" {
		return r.kind + " " + r.name
	}
	return r.kind + " " + r.namespace + "/" + r.name
}

// object is one document of a file: a pointer to an Edge, Model, Pod, ConfigMap or Secret.
type object struct {
	ref
	line  int // only parseLines knows it
	value metav1.Object
}

// maxFile bounds a manifest file in bytes.
const maxFile = 8 << 20

// parse reads all documents of one file. It returns either every object or every problem found.
func parse(file string, content []byte) ([]object, []Problem) {
	if len(content) > maxFile {
		return nil, []Problem{{file, 1, fmt.Sprintf("the file has %d bytes, at most %d are read", len(content), maxFile)}}
	}
	if objects, ok := parseGood(content); ok {
		return objects, nil
	}
	return parseLines(file, content)
}

// parseGood reads a file of which nothing has to be explained: it knows no lines, and is three times as fast for it.
func parseGood(content []byte) ([]object, bool) {
	var objects []object
	dec := yamlv2.NewDecoder(bytes.NewReader(content))
	dec.SetStrict(true)
	for {
		var doc any
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return objects, true
		}
		if err != nil {
			return nil, false
		}
		if doc == nil {
			continue
		}
		js, err := stdjson.Marshal(jsonable(doc))
		if err != nil {
			return nil, false
		}
		o, faults := decode(js)
		if len(faults) > 0 {
			return nil, false
		}
		objects = append(objects, o)
	}
}

// jsonable makes the keys of all maps in v strings, as JSON has them. Of those that sigs.k8s.io/yaml takes it leaves out all but
// strings: a file with others is read by parseLines.
func jsonable(v any) any {
	switch v := v.(type) {
	case map[any]any:
		m := make(map[string]any, len(v))
		for k, e := range v {
			s, ok := k.(string)
			if !ok {
				return math.NaN() // has no JSON
			}
			m[s] = jsonable(e)
		}
		return m
	case []any:
		for i, e := range v {
			v[i] = jsonable(e)
		}
	}
	return v
}

// parseLines reads a file so that every problem has a line.
func parseLines(file string, content []byte) ([]object, []Problem) {
	var objects []object
	var problems []Problem
	dec := yaml.NewDecoder(bytes.NewReader(content))
	for {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, append(problems, syntaxProblem(file, err))
		}
		if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
			continue
		}
		o, bad := parseDocument(file, doc.Content[0])
		problems = append(problems, bad...)
		if len(bad) == 0 {
			objects = append(objects, o)
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return objects, nil
}

var yamlLine = regexp.MustCompile(`^yaml: line (\d+): (.*)$`)

func syntaxProblem(file string, err error) Problem {
	line, reason := 1, strings.TrimPrefix(err.Error(), "yaml: ")
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ = strconv.Atoi(m[1])
		reason = m[2]
	}
	return Problem{file, line, "malformed YAML: " + reason}
}

// kinds maps apiVersion and kind to a constructor.
var kinds = map[metav1.TypeMeta]func() metav1.Object{
	{APIVersion: "v1", Kind: "Pod"}:                       func() metav1.Object { return new(corev1.Pod) },
	{APIVersion: "v1", Kind: "ConfigMap"}:                 func() metav1.Object { return new(corev1.ConfigMap) },
	{APIVersion: "v1", Kind: "Secret"}:                    func() metav1.Object { return new(corev1.Secret) },
	{APIVersion: "longshore.dev/v1alpha1", Kind: "Edge"}:  func() metav1.Object { return new(v1alpha1.Edge) },
	{APIVersion: "longshore.dev/v1alpha1", Kind: "Model"}: func() metav1.Object { return new(v1alpha1.Model) },
}

func parseDocument(file string, n *yaml.Node) (object, []Problem) {
	fail := func(line int, format string, args ...any) (object, []Problem) {
		return object{}, []Problem{{file, line, fmt.Sprintf(format, args...)}}
	}
	if n.Kind != yaml.MappingNode {
		return fail(n.Line, "a document must be an object with apiVersion and kind")
	}
	text, err := yaml.Marshal(n)
	if err != nil {
		return fail(n.Line, "malformed YAML: %v", err)
	}
	js, err := kyaml.YAMLToJSONStrict(text)
	if err != nil {
		return fail(n.Line, "malformed YAML: %v", err)
	}
	o, faults := decode(js)
	o.line = n.Line
	var problems []Problem
	for _, f := range faults {
		problems = append(problems, Problem{file, lineOf(n, f.path), f.reason})
	}
	return o, problems
}

// fault is what is wrong with the field at a path of a document; the path may be empty.
type fault struct{ path, reason string }

// decode makes an object of a document.
func decode(js []byte) (object, []fault) {
	fail := func(path, format string, args ...any) (object, []fault) {
		return object{}, []fault{{path, fmt.Sprintf(format, args...)}}
	}
	var tm metav1.TypeMeta
	if err := json.UnmarshalCaseSensitivePreserveInts(js, &tm); err != nil {
		return fail("", "apiVersion and kind must be strings")
	}
	construct, ok := kinds[tm]
	if !ok {
		return fail("kind", "%s %q is not a kind this folder may hold (Pod, ConfigMap and Secret of v1; Edge and Model of longshore.dev/v1alpha1)", tm.APIVersion, tm.Kind)
	}
	o := object{value: construct()}
	strict, err := json.UnmarshalStrict(js, o.value)
	if err != nil {
		return fail("", "%s: %v", tm.Kind, err)
	}
	if len(strict) > 0 {
		var faults []fault
		for _, e := range strict {
			faults = append(faults, fault{fieldPath(e.Error()), fmt.Sprintf("%s: %v", tm.Kind, e)})
		}
		return object{}, faults
	}
	if path, err := complete(o.value); err != nil {
		return fail(path, "%s: %v", tm.Kind, err)
	}
	o.ref = ref{tm.Kind, o.value.GetNamespace(), o.value.GetName()}
	return o, nil
}

var quotedField = regexp.MustCompile(`field "([^"]+)"`)

func fieldPath(msg string) string {
	if m := quotedField.FindStringSubmatch(msg); m != nil {
		return m[1]
	}
	return ""
}

var pathStep = regexp.MustCompile(`[^.\[\]]+|\[\d+\]`)

// lineOfObject returns the line of object n of a file that is good.
func lineOfObject(file string, content []byte, n int) int {
	if objects, _ := parseLines(file, content); n < len(objects) {
		return objects[n].line
	}
	return 1
}

// lineOf returns the line of the field at a path like spec.containers[0].image, or of the nearest part of it that exists.
func lineOf(n *yaml.Node, path string) int {
	line := n.Line
	for _, step := range pathStep.FindAllString(path, -1) {
		var next *yaml.Node
		if i, err := strconv.Atoi(strings.Trim(step, "[]")); err == nil && n.Kind == yaml.SequenceNode && i < len(n.Content) {
			next, line = n.Content[i], n.Content[i].Line
		}
		for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				next, line = n.Content[i+1], n.Content[i].Line
			}
		}
		if next == nil {
			break
		}
		n = next
	}
	return line
}

// uid makes a stable UID from parts.
func uid(parts ...string) types.UID {
	h := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80 // RFC 9562 version 8
	return types.UID(fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16]))
}

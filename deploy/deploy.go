// Package deploy holds the Kubernetes manifests of the project.
package deploy

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:generate ./generate.sh

//go:embed crds/*.yaml
var crds embed.FS

// CRDs returns the CustomResourceDefinitions of the group longshore.dev as one stream of YAML documents, for kubectl apply.
func CRDs() []byte {
	var all []byte
	names, err := fs.Glob(crds, "crds/*.yaml")
	if err != nil {
		panic(fmt.Sprintf("embedded CRDs: %v", err))
	}
	for _, name := range names {
		doc, err := crds.ReadFile(name)
		if err != nil {
			panic(fmt.Sprintf("embedded CRDs: %v", err))
		}
		all = append(all, doc...)
	}
	return all
}

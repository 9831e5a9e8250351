package ort

import (
	"fmt"
	"os"
	"path/filepath"
)

// LibraryName is the file name of ONNX Runtime's library.
const LibraryName = "libonnxruntime.so.1"

// LibraryVariable is the environment variable that names the library's path.
const LibraryVariable = "LONGSHORE_ORT"

// FindLibrary looks for ONNX Runtime's library: explicit, $LONGSHORE_ORT, beside this program, in Longshore's cache
// ($LONGSHORE_CACHE, or longshore in the user's cache folder), where the dynamic linker looks. A path that was named and
// is not there is an error; the last place is left to Open to try.
func FindLibrary(explicit string) (string, error) {
	for _, named := range []string{explicit, os.Getenv(LibraryVariable)} {
		if named == "" {
			continue
		}
		if _, err := os.Stat(named); err != nil {
			return "", fmt.Errorf("ONNX Runtime library: %w", err)
		}
		return named, nil
	}
	var places []string
	if program, err := os.Executable(); err == nil {
		places = append(places, filepath.Join(filepath.Dir(program), LibraryName))
	}
	if cache := os.Getenv("LONGSHORE_CACHE"); cache != "" {
		places = append(places, filepath.Join(cache, "onnxruntime", LibraryName))
	} else if cache, err := os.UserCacheDir(); err == nil {
		places = append(places, filepath.Join(cache, "longshore", "onnxruntime", LibraryName))
	}
	for _, p := range places {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return LibraryName, nil
}

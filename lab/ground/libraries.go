package ground

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"foothold/internal/command"
	"foothold/internal/durable"
	"foothold/protocol/digest"
)

// File is one measured file of the platform.
type File struct {
	Name string `json:"name"`
	// Path is given for a file that the release does not hold but the host's system
	// does: QEMU's libraries and ROMs.
	Path string `json:"path,omitempty"`
}

// Place is where the file is measured and used: in the memory that the release was
// loaded into, or in the host's system, where between the two nothing but the
// system's own permissions protects it.
func (f File) Place() string {
	if f.Path != "" {
		return f.Path
	}
	return filepath.Join(RunDir, f.Name)
}

// filesFile lists a release's measured files in order. It need not be trusted: leaving
// one out, or adding one, changes the quote as much as changing one.
const filesFile = "files.json"

// MeasuredFiles lists the files of the installed release, in the order of measurement.
func MeasuredFiles(release string) ([]File, error) {
	data, err := os.ReadFile(filepath.Join(release, filesFile))
	if err != nil {
		return nil, fmt.Errorf("read list of measured files: %w", err)
	}
	var files []File
	if err := json.Unmarshal(data, &files); err != nil {
		return nil, fmt.Errorf("read list of measured files: %w", err)
	}
	if len(files) == 0 {
		return nil, errors.New("read list of measured files: it is empty")
	}
	return files, nil
}

// writeFiles lists the release's own files behind those that they build upon.
func writeFiles(release string, system []File) error {
	files := slices.Clone(system)
	for _, name := range PlatformFiles() {
		files = append(files, File{Name: name})
	}
	data, err := json.MarshalIndent(files, "", "  ")
	if err != nil {
		return fmt.Errorf("list measured files: %w", err)
	}
	return durable.WriteFile(filepath.Join(release, filesFile), append(data, '\n'), 0o644)
}

// qemuROMs are what QEMU puts before a VM that is given a kernel. Its accelerator is a
// file of the release.
var qemuROMs = []string{
	"/usr/share/qemu/linuxboot_dma.bin",
	"/usr/share/qemu/kvmvapic.bin",
}

// systemFiles lists the files of the host's system that QEMU runs on.
func systemFiles(ctx context.Context, qemu string) ([]File, error) {
	out, err := command.Output(ctx, "ldd", qemu)
	if err != nil {
		return nil, fmt.Errorf("list QEMU's libraries: %w", err)
	}
	paths, err := libraries(out)
	if err != nil {
		return nil, fmt.Errorf("list QEMU's libraries: %w", err)
	}
	for _, path := range qemuROMs {
		if _, err := os.Stat(path); err == nil {
			paths = append(paths, path)
		}
	}
	var files []File
	for _, path := range paths {
		files = append(files, File{Name: "qemu: " + filepath.Base(path), Path: path})
	}
	return files, nil
}

// libraries reads ldd's output: "NAME => PATH (ADDRESS)", or "PATH (ADDRESS)" for the
// dynamic loader.
func libraries(ldd []byte) ([]string, error) {
	var paths []string
	for line := range bytes.Lines(ldd) {
		text := strings.TrimSpace(string(line))
		if strings.HasPrefix(text, "linux-vdso") {
			continue
		}
		if _, after, ok := strings.Cut(text, " => "); ok {
			text = after
		}
		path, _, _ := strings.Cut(text, " (")
		if !filepath.IsAbs(path) {
			return nil, fmt.Errorf("%q is not found", text)
		}
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return slices.Compact(paths), nil
}

// digestOf is one digest over all the files, by place and content.
func digestOf(files []File) (digest.SHA256, error) {
	var all bytes.Buffer
	for _, f := range files {
		sum, err := durable.Digest(f.Place())
		if err != nil {
			return digest.SHA256{}, err
		}
		fmt.Fprintf(&all, "%s %s\n", sum, f.Place())
	}
	return digest.Of(all.Bytes()), nil
}

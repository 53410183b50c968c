// Package bootimage assembles what a VM boots: a Debian kernel, and an initramfs
// made of a static first process, kernel modules, and a few programs with their
// libraries.
//
// There are two images. The loader image is the provider's: the VM's firmware stage,
// which every host holds as a file and measures. The guest image is the tenant's:
// the shared components, which the organisation signs and the boot server sends.
// Both use Debian's cloud kernel, taken from its package without installing it; apt
// verifies the package against the archive's signatures.
//
// Everything here works as an ordinary user. The same inputs give the same bytes.
package bootimage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"foothold/internal/command"
	"foothold/internal/durable"
	"foothold/protocol/digest"
)

// kernelMeta is the package that depends on the current cloud kernel.
const kernelMeta = "linux-image-cloud-amd64"

// kernelPackage is the form of that dependency; the group is the kernel's release.
var kernelPackage = regexp.MustCompile(`^linux-image-([0-9][a-z0-9.+~-]*-cloud-amd64)$`)

// Kernel is an unpacked kernel package.
type Kernel struct {
	Package string        `json:"package"` // linux-image-RELEASE
	Version string        `json:"version"` // of the package
	Deb     digest.SHA256 `json:"deb"`     // of the package file
	Release string        `json:"release"` // what uname -r shows
	Dir     string        `json:"-"`       // where it is unpacked
}

// Image is the path of the bzImage.
func (k *Kernel) Image() string { return filepath.Join(k.Dir, "boot", "vmlinuz-"+k.Release) }

// Modules is the folder of the modules.
func (k *Kernel) Modules() string { return filepath.Join(k.Dir, "lib", "modules", k.Release) }

// FetchKernel downloads and unpacks the newest cloud kernel that apt knows into
// cacheDir, once. When apt's lists are empty it fetches lists of its own, below
// cacheDir. Without a network, a kernel fetched before serves.
func FetchKernel(ctx context.Context, cacheDir string, progress func(string)) (*Kernel, error) {
	say := orSilent(progress)
	dir := filepath.Join(cacheDir, "kernel")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make kernel cache: %w", err)
	}
	unlock, err := durable.Lock(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	apt, pkg, version, err := newestKernel(ctx, dir, say)
	if err != nil {
		if k := newestCached(dir); k != nil && ctx.Err() == nil {
			say(fmt.Sprintf("cannot ask for the newest kernel; using %s %s, fetched before", k.Package, k.Version))
			return k, nil
		}
		return nil, err
	}
	place := filepath.Join(dir, pkg+"_"+strings.ReplaceAll(version, ":", "%3a"))
	if k, err := openKernel(place); err == nil {
		return k, nil
	}
	say(fmt.Sprintf("downloading %s %s", pkg, version))
	return download(ctx, apt, place, pkg, version)
}

// newestKernel asks apt, first with the machine's lists, then with fresh ones.
func newestKernel(ctx context.Context, dir string, say func(string)) (apt []string, pkg, version string, err error) {
	if pkg, version, err = askApt(ctx, nil); err == nil {
		return nil, pkg, version, nil
	}
	if errors.Is(err, command.ErrMissing) {
		return nil, "", "", err
	}
	if apt, err = freshLists(ctx, dir, say); err != nil {
		return nil, "", "", err
	}
	pkg, version, err = askApt(ctx, apt)
	return apt, pkg, version, err
}

// askApt resolves the meta package to the kernel's package and its version.
func askApt(ctx context.Context, apt []string) (pkg, version string, err error) {
	out, err := command.Output(ctx, "apt-cache", append(slices.Clone(apt), "depends", "--important", kernelMeta)...)
	if err != nil {
		return "", "", fmt.Errorf("find the current cloud kernel: %w", err)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && kernelPackage.MatchString(name) {
			pkg = name
		}
	}
	if pkg == "" {
		return "", "", fmt.Errorf("find the current cloud kernel: %s depends on no known kernel package", kernelMeta)
	}
	version, err = candidate(ctx, apt, pkg)
	return pkg, version, err
}

// download fetches and unpacks beside place, then moves it there whole.
func download(ctx context.Context, apt []string, place, pkg, version string) (*Kernel, error) {
	err := unpack(ctx, apt, place, pkg, version, func(tree string, deb digest.SHA256) error {
		k := Kernel{Package: pkg, Version: version, Deb: deb, Release: kernelPackage.FindStringSubmatch(pkg)[1]}
		data, err := json.MarshalIndent(k, "", "  ")
		if err != nil {
			return fmt.Errorf("record kernel: %w", err)
		}
		return durable.WriteFile(filepath.Join(tree, "kernel.json"), data, 0o644)
	})
	if err != nil {
		return nil, err
	}
	return openKernel(place)
}

// openKernel opens what download left.
func openKernel(place string) (*Kernel, error) {
	data, err := os.ReadFile(filepath.Join(place, "kernel.json"))
	if err != nil {
		return nil, err
	}
	k := &Kernel{Dir: place}
	if err := json.Unmarshal(data, k); err != nil {
		return nil, fmt.Errorf("read kernel record: %w", err)
	}
	for _, path := range []string{k.Image(), filepath.Join(k.Modules(), "modules.builtin")} {
		if _, err := os.Stat(path); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// newestCached is the kernel fetched last, or nil.
func newestCached(dir string) *Kernel {
	var newest *Kernel
	var when fs.FileInfo
	places, _ := filepath.Glob(filepath.Join(dir, "linux-image-*"))
	for _, place := range places {
		k, err := openKernel(place)
		if err != nil {
			continue
		}
		info, err := os.Stat(place)
		if err == nil && (when == nil || info.ModTime().After(when.ModTime())) {
			newest, when = k, info
		}
	}
	return newest
}

func orSilent(progress func(string)) func(string) {
	if progress == nil {
		return func(string) {}
	}
	return progress
}

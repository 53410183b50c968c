package template

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"foothold/internal/command"
	"foothold/internal/durable"
)

// basePackages are in every template beyond minbase (see the package's documentation).
var basePackages = []string{"usr-is-merged", "systemd", "systemd-sysv", "ca-certificates"}

// maxAge is how old a kept bootstrap may grow before it is made anew, so that
// security updates come in.
const maxAge = 7 * 24 * time.Hour

// epoch is the time that all files of an image bear, in seconds since 1970: fixed, so
// that the same packages give the same image.
const epoch = "1700000000"

// rootFiles are taken from a bootstrap for the guest image: the program, every library
// beside it, and the one configuration file that it reads.
var rootFiles = []string{
	"usr/sbin/mkfs.ext4", "usr/sbin/mke2fs", "etc/mke2fs.conf",
	"lib", "lib64", "usr/lib64", "sbin", "usr/lib64/*", "usr/lib/x86_64-linux-gnu/*.so", "usr/lib/x86_64-linux-gnu/*.so.*",
}

// bootstrap is a Debian tree as mmdebstrap made it, kept in the cache.
type bootstrap struct {
	tar    string // the whole tree
	tools  string // rootFiles of it, unpacked
	digest string // of tar, hexadecimal
}

// makeBootstrap makes a bootstrap or takes the kept one, which is younger than
// maxAge or cannot be made anew for want of a network.
func makeBootstrap(ctx context.Context, o *Options, say func(string)) (*bootstrap, error) {
	packages := slices.Concat(basePackages, o.Packages)
	slices.Sort(packages)
	packages = slices.Compact(packages)
	key := sha256.Sum256([]byte(strings.Join(slices.Concat([]string{"2", o.Suite, epoch}, packages, []string{""}, o.Mirrors), "\n")))
	parent := filepath.Join(o.CacheDir, "bootstrap")
	place := filepath.Join(parent, hex.EncodeToString(key[:8]))
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, fmt.Errorf("make bootstrap cache: %w", err)
	}
	unlock, err := durable.Lock(ctx, place+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	kept, age, keptErr := openBootstrap(place)
	if keptErr == nil && age < maxAge && !o.Patch {
		return kept, nil
	}
	say("bootstrapping Debian " + o.Suite + " (about 45 s)")
	if err := runBootstrap(ctx, o, packages, place); err != nil {
		if keptErr == nil && ctx.Err() == nil && !o.Patch {
			say(fmt.Sprintf("bootstrapping failed (%v); using the one made %s ago", err, age.Round(time.Hour)))
			return kept, nil
		}
		return nil, err
	}
	fresh, _, err := openBootstrap(place)
	return fresh, err
}

func openBootstrap(place string) (*bootstrap, time.Duration, error) {
	b := &bootstrap{tar: filepath.Join(place, "root.tar"), tools: filepath.Join(place, "tools")}
	text, err := os.ReadFile(filepath.Join(place, "digest"))
	if err != nil {
		return nil, 0, err
	}
	b.digest = string(text)
	info, err := os.Stat(b.tar)
	if err != nil {
		return nil, 0, err
	}
	return b, time.Since(info.ModTime()), nil
}

// runBootstrap makes a bootstrap beside its place and moves it there.
func runBootstrap(ctx context.Context, o *Options, packages []string, place string) error {
	work, err := os.MkdirTemp(filepath.Dir(place), ".new-")
	if err != nil {
		return fmt.Errorf("make a work folder: %w", err)
	}
	defer os.RemoveAll(work)
	tree := filepath.Join(work, "bootstrap")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return fmt.Errorf("make a work folder: %w", err)
	}
	b := bootstrap{tar: filepath.Join(tree, "root.tar"), tools: filepath.Join(tree, "tools")}
	args := []string{"--mode=unshare", "--variant=minbase", "--architectures=amd64", "--format=tar",
		"--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", "--include=" + strings.Join(packages, ","),
		"--dpkgopt=force-unsafe-io"}
	for _, dir := range []string{"doc", "man", "info", "locale", "lintian"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+dir+"/*")
	}
	cmd, err := command.New(ctx, "mmdebstrap", slices.Concat(args, []string{o.Suite, b.tar}, o.Mirrors)...)
	if err != nil {
		return err
	}
	cmd.Env = append(cmd.Env, "SOURCE_DATE_EPOCH="+epoch)
	if _, err := command.Wait(cmd); err != nil {
		return fmt.Errorf("bootstrap Debian %s: %w", o.Suite, err)
	}
	if err := unpack(b.tar, b.tools); err != nil {
		return err
	}
	sum, err := durable.Digest(b.tar)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tree, "digest"), []byte(sum.String()), 0o644); err != nil {
		return fmt.Errorf("record bootstrap: %w", err)
	}
	if err := os.RemoveAll(place); err != nil {
		return fmt.Errorf("remove old bootstrap: %w", err)
	}
	return durable.Publish(tree, place)
}

// unpack takes rootFiles out of the archive, as the user's own files. Names and links
// cannot lead outside: only the listed names are written, each under a resolved parent.
func unpack(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("open bootstrap: %w", err)
	}
	defer f.Close()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make tools folder: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open tools folder: %w", err)
	}
	defer root.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read bootstrap: %w", err)
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "./"))
		if !slices.ContainsFunc(rootFiles, func(p string) bool { ok, _ := path.Match(p, name); return ok }) {
			continue
		}
		if err := unpackOne(root, r, h, name); err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
	}
}

func unpackOne(root *os.Root, r io.Reader, h *tar.Header, name string) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		return root.Link(path.Clean(strings.TrimPrefix(h.Linkname, "./")), name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		return errors.Join(err, f.Close())
	}
	return nil
}

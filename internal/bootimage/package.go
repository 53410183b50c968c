package bootimage

import (
	"context"
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

// FetchTree downloads and unpacks a Debian package into cacheDir, once for each version,
// as [FetchKernel] does for the kernel, and returns the folder of its files. Nothing is
// installed. Without a network, a version fetched before serves.
func FetchTree(ctx context.Context, cacheDir, pkg string, progress func(string)) (string, error) {
	say := orSilent(progress)
	dir := filepath.Join(cacheDir, "packages")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make package cache: %w", err)
	}
	unlock, err := durable.Lock(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	var apt []string
	version, err := candidate(ctx, apt, pkg)
	if err != nil && !errors.Is(err, command.ErrMissing) {
		if apt, err = freshLists(ctx, dir, say); err == nil {
			version, err = candidate(ctx, apt, pkg)
		}
	}
	if err != nil {
		places, _ := filepath.Glob(filepath.Join(dir, pkg+"_*"))
		if len(places) == 0 || ctx.Err() != nil {
			return "", err
		}
		say("cannot ask for the newest " + pkg + "; using " + filepath.Base(places[len(places)-1]) + ", fetched before")
		return places[len(places)-1], nil
	}
	place := filepath.Join(dir, pkg+"_"+strings.ReplaceAll(version, ":", "%3a"))
	if _, err := os.Stat(place); err == nil { // it was moved there whole
		return place, nil
	}
	say(fmt.Sprintf("downloading %s %s", pkg, version))
	return place, unpack(ctx, apt, place, pkg, version, func(string, digest.SHA256) error { return nil })
}

// freshLists fetches package lists below dir, and returns apt's options to use them.
func freshLists(ctx context.Context, dir string, say func(string)) (apt []string, err error) {
	say("fetching package lists")
	state := filepath.Join(dir, "apt")
	for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(state, sub), 0o755); err != nil {
			return nil, fmt.Errorf("make apt folders: %w", err)
		}
	}
	apt = []string{"-o", "Dir::State::lists=" + state + "/lists", "-o", "Dir::Cache=" + state + "/cache", "-o", "Debug::NoLocking=1"}
	if err := command.Run(ctx, "apt-get", append(slices.Clone(apt), "-q", "update")...); err != nil {
		return nil, fmt.Errorf("fetch package lists: %w", err)
	}
	return apt, nil
}

// candidate is the version of a package that apt would install.
func candidate(ctx context.Context, apt []string, pkg string) (string, error) {
	out, err := command.Output(ctx, "apt-cache", append(slices.Clone(apt), "policy", pkg)...)
	if err != nil {
		return "", fmt.Errorf("find the version of %s: %w", pkg, err)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Candidate: "); ok && v != "(none)" {
			return v, nil
		}
	}
	return "", fmt.Errorf("find the version of %s: apt has no candidate", pkg)
}

// unpack fetches and unpacks a package beside place, lets record add to its tree, then
// moves the tree there whole.
func unpack(ctx context.Context, apt []string, place, pkg, version string, record func(tree string, deb digest.SHA256) error) error {
	work, err := os.MkdirTemp(filepath.Dir(place), ".new-")
	if err != nil {
		return fmt.Errorf("make a work folder: %w", err)
	}
	defer os.RemoveAll(work)
	cmd, err := command.New(ctx, "apt-get", append(slices.Clone(apt), "-q", "download", pkg+"="+version)...)
	if err != nil {
		return err
	}
	cmd.Dir = work
	if _, err := command.Wait(cmd); err != nil {
		return fmt.Errorf("download %s: %w", pkg, err)
	}
	debs, _ := filepath.Glob(filepath.Join(work, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("download %s: apt left %d packages", pkg, len(debs))
	}
	sum, err := durable.Digest(debs[0])
	if err != nil {
		return err
	}
	tree := filepath.Join(work, "tree")
	if err := command.Run(ctx, "dpkg-deb", "-x", debs[0], tree); err != nil {
		return fmt.Errorf("unpack %s: %w", pkg, err)
	}
	if err := record(tree, sum); err != nil {
		return err
	}
	os.RemoveAll(place) // a place that did not open
	return durable.Publish(tree, place)
}

// Package durable writes files and folders so that a crash leaves the old or the
// new one, whole, and never a mixture.
package durable

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"foothold/protocol/digest"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a waiting Lock tries again.
const lockPoll = 100 * time.Millisecond

// WriteFile replaces path by data: written beside it, synced, renamed, and the
// rename synced. After an error the old file stands.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	return Write(path, perm, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// Write is WriteFile for a file that fill writes.
func Write(path string, perm fs.FileMode, fill func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// Publish moves a finished folder to its place, which must not exist or be empty.
// Everything in it reaches the disk before the move.
func Publish(dir, place string) error {
	if err := syncTree(dir); err != nil {
		return fmt.Errorf("publish %s: %w", place, err)
	}
	if err := os.Rename(dir, place); err != nil {
		return fmt.Errorf("publish %s: %w", place, err)
	}
	return syncDir(filepath.Dir(place))
}

// Replace is Publish for a place that may hold an older folder: the two change places
// in one step, then the old one is removed.
func Replace(dir, place string) error {
	if err := syncTree(dir); err != nil {
		return fmt.Errorf("replace %s: %w", place, err)
	}
	err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, place, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		return Publish(dir, place)
	}
	if err != nil {
		return fmt.Errorf("replace %s: %w", place, err)
	}
	if err := syncDir(filepath.Dir(place)); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// Lock takes the exclusive lock of a file, waiting for its holder until ctx ends.
// The lock ends with unlock or with the process.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for the holder of %s: %w", path, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// Digest hashes a file.
func Digest(path string) (digest.SHA256, error) {
	var d digest.SHA256
	f, err := os.Open(path)
	if err != nil {
		return d, fmt.Errorf("hash file: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return d, fmt.Errorf("hash %s: %w", path, err)
	}
	h.Sum(d[:0])
	return d, nil
}

// syncTree asks once for the whole file system that holds dir, which is quicker
// than file by file for a tree of thousands.
func syncTree(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

package opener

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// WriteEtc writes the instance's files into the memory layer of the OS's /etc.
func WriteEtc(files map[string]string) error {
	for name, text := range files {
		path := filepath.Join(Root, "etc", name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) { // it may be a link out of /etc
			return fmt.Errorf("write /etc/%s: %w", name, err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("write /etc/%s: %w", name, err)
		}
		if err := os.Chmod(path, 0o644); err != nil { // whatever the umask
			return fmt.Errorf("write /etc/%s: %w", name, err)
		}
	}
	return nil
}

// Switch makes the OS's root the root, taking /dev, /proc, /sys and /run along, and
// frees the initramfs: its programs and whatever they may have left are gone.
func Switch() error {
	var old unix.Stat_t
	if err := unix.Stat("/", &old); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	initramfs, err := os.ReadDir("/")
	if err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := unix.Mount(dir, Root+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	for _, e := range initramfs {
		if err := remove("/"+e.Name(), old.Dev); err != nil {
			return fmt.Errorf("free the initramfs: %w", err)
		}
	}
	if err := unix.Chdir(Root); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	return nil
}

// remove deletes a tree of one file system; directories that are mount points stay.
func remove(path string, dev uint64) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if st.Dev != dev {
		return nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.Unlink(path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := remove(filepath.Join(path, e.Name()), dev); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(path); err != nil && err != unix.EBUSY && err != unix.ENOTEMPTY {
		return err
	}
	return nil
}

// populate copies a folder of the template to the volume, with owners and modes. It
// makes the copy beside its place and renames it, so that a cut start fills again.
func populate(from, to string, mode os.FileMode) error {
	partial := to + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	if err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		return copyEntry(path, filepath.Join(partial, rel))
	}); err != nil {
		return err
	}
	if err := os.Chmod(partial, mode); err != nil {
		return err
	}
	return os.Rename(partial, to)
}

func copyEntry(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := unix.Mkdir(to, 0o700); err != nil {
			return err
		}
	case unix.S_IFLNK:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		if err := os.Symlink(target, to); err != nil {
			return err
		}
		return os.Lchown(to, int(st.Uid), int(st.Gid))
	case unix.S_IFREG:
		if err := copyFile(from, to); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s is neither file, folder nor link", from)
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(to, st.Mode&0o7777)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

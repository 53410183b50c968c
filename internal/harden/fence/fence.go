// Package fence bounds which files a daemon opens, by the kernel's Landlock: what the
// daemon names in [Files] and nothing else, however it was taken over. It also keeps
// the daemon from signalling processes, and from abstract sockets, that are not its own.
//
// Landlock refuses by file, not by name: a file that is put in a named one's place later
// is not open to the daemon, one below a named folder is. A kernel that knows less of
// Landlock enforces less, and one that knows nothing of it nothing; [Files.Enclose] says
// which version is in force, for the log.
package fence

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// Newest is the newest version of Landlock that is made use of.
const Newest = 11

// Files are all that a daemon opens after it has read its configuration.
type Files struct {
	// Own are the folders that the daemon writes; they are made where they are missing.
	Own []string
	// Read are files and folders that it only reads. One that is missing is passed over:
	// who needs it says so better.
	Read []string
	// Kernel are files and folders of /proc/sys that it sets.
	Kernel []string
	// Devices are device files that it reads, writes and sets.
	Devices []string
}

// Rights. None of them is to run a program: a daemon that is enclosed starts none.
const (
	read   landlock.AccessFSSet = ll.AccessFSReadFile | ll.AccessFSReadDir
	set    landlock.AccessFSSet = ll.AccessFSWriteFile | ll.AccessFSTruncate
	change landlock.AccessFSSet = set | ll.AccessFSMakeReg | ll.AccessFSMakeDir | ll.AccessFSRemoveFile | ll.AccessFSRemoveDir
)

// system is what Go's libraries read of a system on their own.
var system = []string{"/proc/sys/net/core/somaxconn", "/etc/localtime", "/usr/share/zoneinfo"}

// Enclose bounds every thread of this process and what it starts, for good, and returns
// the version of Landlock in force, 0 for none.
func (f Files) Enclose() (version int, err error) {
	config := landlock.V11.BestEffort()
	var rules []landlock.Rule
	for _, dir := range f.Own {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return 0, fmt.Errorf("bound files: %w", err)
		}
		rules = append(rules, landlock.PathAccess(read|change, dir))
	}
	add := func(access landlock.AccessFSSet, paths []string) error {
		for _, path := range paths {
			info, err := os.Stat(path)
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return fmt.Errorf("bound files: %w", err)
			case info.IsDir():
				rules = append(rules, landlock.PathAccess(access, path))
			default: // a file knows no rights of folders
				rules = append(rules, landlock.PathAccess(access&^ll.AccessFSReadDir, path))
			}
		}
		return nil
	}
	if err := errors.Join(add(read, append(f.Read, system...)), add(read|set, f.Kernel), add(read|set|ll.AccessFSIoctlDev, f.Devices)); err != nil {
		return 0, err
	}
	if err := config.RestrictPaths(rules...); err != nil {
		return 0, fmt.Errorf("bound files: %w", err)
	}
	if err := config.RestrictScoped(); err != nil {
		return 0, fmt.Errorf("bound signals: %w", err)
	}
	return inForce(), nil
}

func inForce() int {
	version, err := ll.LandlockGetABIVersion()
	if err != nil {
		return 0
	}
	return min(version, Newest)
}

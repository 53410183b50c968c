package template

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"foothold/internal/kmod"
	"foothold/protocol/bundle"
	"foothold/protocol/digest"
	"foothold/tenant/expect"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"
)

// maxUnpacked bounds an unpacked initramfs in bytes; it has to fit into a small VM.
const maxUnpacked = 512 << 20

// initramfsMounts are what the agent mounts as the first process.
var initramfsMounts = []expect.Mount{
	{Source: "*", Target: "/", Type: "rootfs"},
	{Source: "*", Target: "/proc", Type: "proc", Options: []string{"nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/sys", Type: "sysfs", Options: []string{"nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/dev", Type: "devtmpfs", Options: []string{"nosuid"}},
	{Source: "*", Target: "/run", Type: "tmpfs", Options: []string{"nosuid", "nodev"}},
}

// running are the programs of the OS that run once it is up: the service manager, the
// journal, what the agent starts the workload by and asks how it fares, and what the OS
// goes down by, so that no audit that meets a reboot ends the VM for good. Anything else
// of the template that runs is one thing too many.
var running = []string{
	"/usr/lib/systemd/systemd", "/usr/lib/systemd/systemd-journald", "/usr/bin/systemd-run", "/usr/bin/systemctl",
	"/usr/bin/umount", "/usr/lib/systemd/systemd-shutdown",
}

// osMounts are what the agent mounts, and systemd by itself (mount_table of its
// src/shared/mount-setup.c, and one for each service's credentials); units that mount
// more are masked. The root itself is judged apart.
var osMounts = append([]expect.Mount{
	{Source: "*", Target: "/etc", Type: "overlay", Options: []string{"nosuid", "nodev"}},
	{Source: "*", Target: "/tmp", Type: "tmpfs", Options: []string{"nosuid", "nodev"}},
	{Source: expect.SourceVolume, Target: "/var", Type: "ext4", Options: []string{"nosuid", "nodev"}},
	{Source: expect.SourceVolume, Target: "/home", Type: "ext4", Options: []string{"nosuid", "nodev"}},
	{Source: expect.SourceVolume, Target: "/root", Type: "ext4", Options: []string{"nosuid", "nodev"}},
	{Source: expect.SourceVolume, Target: "/srv", Type: "ext4", Options: []string{"nosuid", "nodev"}},
	{Source: "*", Target: "/dev/pts", Type: "devpts", Options: []string{"nosuid", "noexec"}},
	{Source: "*", Target: "/dev/shm", Type: "tmpfs", Options: []string{"nosuid", "nodev"}},
	{Source: "*", Target: "/run/lock", Type: "tmpfs", Options: []string{"nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/run/credentials/*.service", Type: "ramfs", Options: []string{"ro", "nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/sys/fs/cgroup", Type: "cgroup2", Options: []string{"nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/sys/fs/bpf", Type: "bpf", Options: []string{"nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/sys/fs/pstore", Type: "pstore", Options: []string{"nosuid", "nodev", "noexec"}},
	{Source: "*", Target: "/sys/kernel/security", Type: "securityfs", Options: []string{"nosuid", "nodev", "noexec"}},
}, initramfsMounts[1:]...)

// instanceFiles are what the agent writes into the memory layer of /etc for one VM.
var instanceFiles = []expect.File{
	{Path: "/etc/machine-id"}, {Path: "/etc/hostname"}, {Path: "/etc/hosts"}, {Path: "/etc/resolv.conf"},
	{Path: "/etc/.pwd.lock", SHA256: digest.Of(nil)}, // empty: systemd takes this lock for a workload's own user
}

// Expectations is what every VM of the template looks like when it runs as it should:
// the first audit is held against the content of the initramfs, file by file, the
// second against the few programs of the OS image that run, and its users.
func (t *Template) Expectations() (expect.Template, error) {
	e := expect.Template{Kernel: t.Release, AuthenticatedVolume: t.AuthenticatedVolume}
	files, modules, err := readInitramfs(t.Initramfs())
	if err != nil {
		return e, fmt.Errorf("expectations of template %s: %w", t.Name, err)
	}
	for _, f := range files {
		if f.Path == "/init" {
			e.Agent = f.SHA256
		}
	}
	e.Modules = modules
	e.Initramfs = expect.Stage{Mounts: initramfsMounts, Files: append(files,
		expect.File{Path: "/" + bundle.UniquePath}, expect.File{Path: "/" + bundle.PrivateKeyPath})}
	e.OS = expect.Stage{Mounts: osMounts, Files: instanceFiles}
	for _, p := range t.Contents.Programs {
		if slices.Contains(running, p.Path) {
			e.OS.Programs = append(e.OS.Programs, expect.Program{Path: p.Path, SHA256: p.SHA256})
		}
	}
	if len(e.OS.Programs) != len(running) {
		return e, fmt.Errorf("expectations of template %s: its OS lacks one of %v", t.Name, running)
	}
	for _, u := range t.Contents.Users {
		e.OS.Users = append(e.OS.Users, expect.User{Name: u.Name, UID: u.UID, Shell: u.Shell})
	}
	if err := e.Validate(); err != nil {
		return e, fmt.Errorf("expectations of template %s: %w", t.Name, err)
	}
	return e, nil
}

// readInitramfs lists the files of an initramfs, as package facts of the guest would
// report them, and the names of its kernel modules.
func readInitramfs(path string) ([]expect.File, []string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("open initramfs: %w", err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, nil, fmt.Errorf("unpack initramfs: %w", err)
	}
	defer z.Close()
	var files []expect.File
	var modules []string
	for r := cpio.NewReader(io.LimitReader(z, maxUnpacked)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, modules, nil
		}
		if err != nil {
			return nil, nil, fmt.Errorf("unpack initramfs: %w", err)
		}
		name := "/" + strings.TrimPrefix(h.Name, "/")
		var data []byte
		switch {
		case h.Mode.IsDir():
			continue
		case h.Mode&cpio.ModeType == cpio.TypeSymlink:
			data = []byte(h.Linkname) // a link's digest is that of its target's text
		case h.Mode.IsRegular():
			if data, err = io.ReadAll(r); err != nil {
				return nil, nil, fmt.Errorf("unpack %s: %w", name, err)
			}
		default:
			return nil, nil, fmt.Errorf("unpack %s: neither file, folder nor link", name)
		}
		if name == kmod.ListFile {
			set, err := kmod.Parse(bytes.NewReader(data))
			if err != nil {
				return nil, nil, err
			}
			modules = set.Names()
		}
		files = append(files, expect.File{Path: name, SHA256: digest.Of(data)})
	}
}

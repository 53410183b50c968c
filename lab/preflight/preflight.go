// Package preflight says what a machine lacks to run the lab, each finding with the
// exact line that mends it. It changes nothing.
package preflight

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"foothold/internal/command"
)

// Finding is one thing that is missing.
type Finding struct {
	What string
	Mend string // a line for a shell
	Root bool   // the line needs root, and is safe to run as it stands
}

// Able says whether this user can run a finding's line without being asked for
// root's password: it is root, or has sudo.
func Able() bool {
	if os.Geteuid() == 0 {
		return true
	}
	_, err := exec.LookPath("sudo")
	return err == nil
}

// program is something that a Debian package brings.
type program struct{ name, pkg string }

// programs is what the lab, the template's build and the tests run.
var programs = []program{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"/usr/share/qemu/qboot.rom", "qemu-system-data"},
	{"qemu-img", "qemu-utils"},
	{"swtpm", "swtpm"},
	{"swtpm_setup", "swtpm-tools"},
	{"mmdebstrap", "mmdebstrap"},
	{"newuidmap", "uidmap"},
	{"mkfs.erofs", "erofs-utils"},
	{"cryptsetup", "cryptsetup-bin"},
	{"veritysetup", "cryptsetup-bin"},
	{"mkfs.ext4", "e2fsprogs"},
	{"depmod", "kmod"},
	{"ip", "iproute2"},
	{"nft", "nftables"},
	{"zstd", "zstd"},
	{"gcc", "gcc"},
	{"/usr/include/stdlib.h", "libc6-dev"},
	{"/etc/ssl/certs/ca-certificates.crt", "ca-certificates"},
}

// missingPackages lists the Debian packages that this machine lacks, in a fixed order.
func missingPackages() []string {
	var list []string
	for _, p := range programs {
		if !present(p.name) && !slices.Contains(list, p.pkg) {
			list = append(list, p.pkg)
		}
	}
	return list
}

func present(name string) bool {
	if filepath.IsAbs(name) {
		_, err := os.Stat(name)
		return err == nil
	}
	_, err := command.Find(name)
	return err == nil
}

// minSpace is what templates, kernels, images and a few volumes take, in bytes.
const minSpace = 4 << 30

// Check returns everything that is missing.
func Check() []Finding {
	var all []Finding
	if missing := missingPackages(); len(missing) > 0 {
		all = append(all, rootFinding("packages "+strings.Join(missing, ", "),
			"sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "+strings.Join(missing, " ")+"'"))
	}
	for _, check := range []func() *Finding{subordinateIDs, userNamespaces, tun, space} {
		if f := check(); f != nil {
			all = append(all, *f)
		}
	}
	return all
}

// rootFinding has the line as this user types it.
func rootFinding(what, line string) Finding {
	switch {
	case os.Geteuid() == 0:
	case Able():
		line = "sudo " + line
	default:
		line = "su -c " + strconv.Quote(line)
	}
	return Finding{What: what, Mend: line, Root: true}
}

// subordinateIDs: newuidmap maps ranges of /etc/subuid alone, for root as well;
// mmdebstrap needs one for the template's users.
func subordinateIDs() *Finding {
	me, err := user.Current()
	if err != nil {
		return &Finding{What: "a name for user id " + strconv.Itoa(os.Getuid()), Mend: "run as a user that /etc/passwd knows"}
	}
	if hasRange("/etc/subuid", me) && hasRange("/etc/subgid", me) {
		return nil
	}
	f := rootFinding("a range of subordinate user and group ids for "+me.Username,
		"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "+me.Username)
	return &f
}

func hasRange(file string, me *user.User) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) != 3 || fields[0] != me.Username && fields[0] != me.Uid {
			continue
		}
		if n, err := strconv.Atoi(fields[2]); err == nil && n >= 65536 {
			return true
		}
	}
	return false
}

// userNamespaces tries to make the namespaces that the lab needs.
func userNamespaces() *Finding {
	cmd := exec.Command("/proc/self/exe", "version")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	if cmd.Run() == nil {
		return nil
	}
	for setting, want := range map[string]string{
		"kernel.unprivileged_userns_clone":             "1",
		"kernel.apparmor_restrict_unprivileged_userns": "0",
	} {
		path := "/proc/sys/" + strings.ReplaceAll(setting, ".", "/")
		if data, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(data)) != want {
			f := rootFinding("user namespaces for ordinary users", "sysctl -w "+setting+"="+want)
			return &f
		}
	}
	f := rootFinding("user namespaces for ordinary users", "sysctl -w user.max_user_namespaces=15000")
	return &f
}

// tun: VMs' network interfaces and the user-space WireGuard need it.
func tun() *Finding {
	const path = "/dev/net/tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
		return nil
	}
	if errors.Is(err, unix.ENOENT) {
		f := rootFinding(path, "modprobe tun")
		return &f
	}
	f := rootFinding("permission to open "+path, "chmod 0666 "+path)
	return &f
}

func space() *Finding {
	dir, err := os.Getwd()
	if err != nil {
		return &Finding{What: "a working directory", Mend: "cd to the clone"}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return &Finding{What: fmt.Sprintf("a readable file system (%v)", err), Mend: "cd to the clone"}
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < minSpace {
		return &Finding{What: fmt.Sprintf("disk space: %d MiB are free here, %d MiB are needed", free>>20, minSpace>>20), Mend: "make clean, or use another disk"}
	}
	return nil
}

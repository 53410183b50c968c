// Command init is the first process of a plain boot: the template's OS without
// encryption, attestation or tunnel, as the yardstick for what Foothold adds.
//
// Kernel arguments: plainboot.address=IP/PREFIX, plainboot.gateway=IP. Disks: vda is
// the OS image, vdb (where present) an ext4 volume. /workload is started as a
// service. With plainboot.crypt=1 both disks are opened first as in a real start, from
// /template.header, /template.passphrase, /verity, /volume.header, /volume.passphrase.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"foothold/internal/devmapper"
	"foothold/internal/kmod"
	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/digest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const root = "/sysroot"

// unit runs the workload as an agent would: as a user of its own, without rights.
const unit = `[Unit]
Description=Workload
[Service]
ExecStart=/run/foothold/workload
DynamicUser=yes
NoNewPrivileges=yes
`

func main() {
	if err := start(); err != nil {
		fmt.Println("PLAINBOOT failed:", err)
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}

func start() error {
	if err := mountAll([][3]string{{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}, {"tmpfs", "/run", "mode=0755"}}); err != nil {
		return err
	}
	say("first process")
	args, err := arguments()
	if err != nil {
		return err
	}
	set, err := kmod.Open()
	if err != nil {
		return err
	}
	if err := set.Load("virtio_pci", "virtio_net", "virtio_blk", "erofs", "overlay"); err != nil {
		return err
	}
	if err := network(args["plainboot.address"], args["plainboot.gateway"]); err != nil {
		return err
	}
	disk, volume := "/dev/vda", "/dev/vdb"
	if args["plainboot.crypt"] == "1" {
		if err := set.LoadAll(); err != nil {
			return err
		}
		say("modules loaded")
		if disk, volume, err = open(); err != nil {
			return err
		}
		say("disk opened")
	}
	if err := mountOS(disk, volume); err != nil {
		return err
	}
	if err := placeWorkload(); err != nil {
		return err
	}
	if args["plainboot.crypt"] == "1" {
		unix.Sync() // the test looks for what was written, and ends the machine by force
	}
	say("handing over to systemd")
	return switchRoot(args["plainboot.systemd"])
}

// say puts a milestone and the time since the kernel's start on the console.
func say(what string) {
	up, _ := os.ReadFile("/proc/uptime")
	fmt.Printf("PLAINBOOT %s at %s\n", what, strings.Fields(string(up) + " ? ?")[0])
}

// arguments are the kernel command line's NAME=VALUE words.
func arguments() (map[string]string, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	args := map[string]string{}
	for _, word := range strings.Fields(string(line)) {
		name, value, _ := strings.Cut(word, "=")
		args[name] = value
	}
	return args, nil
}

func network(address, gateway string) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find network card: %w", err)
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return fmt.Errorf("read address: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(link, addr), netlink.LinkSetUp(link),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway)}))
}

// open opens the encrypted disks as the agent does: the template, verified, and the volume.
func open() (disk, volume string, err error) {
	text, err := os.ReadFile("/verity") // ROOTHASH OFFSET
	if err != nil {
		return "", "", err
	}
	hash, offset, _ := strings.Cut(string(text), " ")
	root, err := digest.Parse(hash)
	if err != nil {
		return "", "", err
	}
	hashOffset, err := strconv.ParseInt(offset, 10, 64)
	if err != nil {
		return "", "", err
	}
	for _, d := range []struct {
		name, device string
		readOnly     bool
	}{{"template", "/dev/vda", true}, {"volume", "/dev/vdb", false}} {
		if err := decrypt(d.name, d.device, d.readOnly); err != nil {
			return "", "", fmt.Errorf("open %s: %w", d.name, err)
		}
	}
	return devmapper.Dir + "/os", devmapper.Dir + "/volume", devmapper.Verity("os", devmapper.Dir+"/template", root, hashOffset)
}

// decrypt opens a disk by /NAME.header and /NAME.passphrase.
func decrypt(name, device string, readOnly bool) error {
	passphrase, err := os.ReadFile("/" + name + ".passphrase")
	if err != nil {
		return err
	}
	header, err := os.ReadFile("/" + name + ".header")
	if err != nil {
		return err
	}
	key, err := luks.Unlock(header, secret.New(passphrase))
	if err != nil {
		return err
	}
	defer key.Wipe()
	return devmapper.Crypt(name, device, key, readOnly)
}

// mountOS mounts the OS as package template's documentation says.
func mountOS(disk, volumeDisk string) error {
	if err := unix.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(disk, root, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return fmt.Errorf("mount OS: %w", err)
	}
	volume := "/run/volume"
	if err := unix.Mkdir(volume, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(volumeDisk, volume, "ext4", unix.MS_NODEV|unix.MS_NOSUID, ""); errors.Is(err, unix.ENOENT) {
		err = unix.Mount("tmpfs", volume, "tmpfs", 0, "mode=0700")
	} else if err != nil {
		return fmt.Errorf("mount volume: %w", err)
	}
	for _, dir := range []string{"var", "home", "root", "srv"} {
		source := filepath.Join(volume, dir)
		if err := os.MkdirAll(source, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(source, filepath.Join(root, dir), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount /%s: %w", dir, err)
		}
	}
	for _, dir := range []string{"/run/etc", "/run/etc/upper", "/run/etc/work"} {
		if err := unix.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("overlay", root+"/etc", "overlay", unix.MS_NODEV|unix.MS_NOSUID,
		"lowerdir="+root+"/etc,upperdir=/run/etc/upper,workdir=/run/etc/work"); err != nil {
		return fmt.Errorf("mount /etc: %w", err)
	}
	if err := os.WriteFile(root+"/etc/machine-id", []byte(strings.Repeat("5", 32)+"\n"), 0o444); err != nil {
		return err
	}
	return unix.Mount("tmpfs", root+"/tmp", "tmpfs", unix.MS_NODEV|unix.MS_NOSUID, "mode=1777")
}

// placeWorkload puts the workload and its unit under /run.
func placeWorkload() error {
	program, err := os.ReadFile("/workload")
	if err != nil {
		return err
	}
	wants := "/run/systemd/system/multi-user.target.wants"
	if err := errors.Join(os.MkdirAll("/run/foothold", 0o755), os.MkdirAll(wants, 0o755)); err != nil {
		return err
	}
	return errors.Join(os.WriteFile("/run/foothold/workload", program, 0o755),
		os.WriteFile("/run/systemd/system/foothold-workload.service", []byte(unit), 0o644),
		os.Symlink("../foothold-workload.service", wants+"/foothold-workload.service"))
}

// switchRoot moves the mounts into the OS and becomes its systemd.
func switchRoot(extra string) error {
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := unix.Mount(dir, root+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(root, "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := errors.Join(unix.Chroot("."), unix.Chdir("/")); err != nil {
		return err
	}
	args := []string{"/sbin/init"}
	if extra != "" {
		args = append(args, strings.Split(extra, ",")...)
	}
	return unix.Exec("/sbin/init", args, []string{"PATH=/usr/sbin:/usr/bin"})
}

func mountAll(list [][3]string) error {
	for _, m := range list {
		if err := unix.Mount(m[0], m[1], m[0], unix.MS_NOSUID, m[2]); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	return nil
}

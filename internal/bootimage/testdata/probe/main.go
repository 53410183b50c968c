// Command probe is the first process of the boot tests: it loads every module of its initramfs, runs
// every program there, says what it found on the console, and powers off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"foothold/internal/kmod"

	"golang.org/x/sys/unix"
)

func main() {
	if err := probe(); err != nil {
		fmt.Println("PROBE failed:", err)
	} else {
		fmt.Println("PROBE good")
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func probe() error {
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}, {"/run", "tmpfs"}} {
		if err := unix.Mount(m[1], m[0], m[1], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[0], err)
		}
	}
	set, err := kmod.Open()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := set.LoadAll(); err != nil {
		return err
	}
	uptime, _ := os.ReadFile("/proc/uptime")
	fmt.Printf("PROBE modules in %.2f s, up %s", time.Since(start).Seconds(), uptime)
	loaded, err := os.ReadFile("/proc/modules")
	if err != nil {
		return err
	}
	for _, line := range strings.Split(strings.TrimSpace(string(loaded)), "\n") {
		fmt.Println("PROBE module", strings.Fields(line)[0])
	}
	if item, err := os.ReadFile("/sys/firmware/qemu_fw_cfg/by_name/opt/foothold/probe/raw"); err == nil {
		fmt.Println("PROBE fw_cfg", string(item))
	}
	ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, port := range ports {
		name, _ := os.ReadFile(port)
		fmt.Print("PROBE port ", string(name))
	}
	if _, err := os.Stat("/sys/class/net/eth0"); err == nil {
		fmt.Println("PROBE network")
	}
	programs, _ := filepath.Glob("/usr/sbin/*")
	for _, program := range programs {
		out, err := exec.Command(program, "-V").CombinedOutput()
		fmt.Printf("PROBE program %s: %v: %s\n", filepath.Base(program), err, strings.TrimSpace(string(out)))
	}
	return nil
}

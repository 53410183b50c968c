// Command init is the first process of a lab's production host: it mounts the OS disk,
// loads the modules that are there, lets foothold-host enrol and quote, runs it as the
// host's agent and asks that for a quote, and hands out what came of it by a virtio port.
// Then it powers the machine off.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"foothold/internal/kmod"
	"foothold/lab/hostimage"
	"foothold/protocol/inventory"
	"foothold/provider/enroll"

	"golang.org/x/sys/unix"
)

// Where the OS disk is, and is mounted.
const (
	disk = "/dev/vda"
	root = hostimage.Root
)

// maxQuestion bounds a question in bytes.
const maxQuestion = 4096

func main() {
	if err := serve(); err != nil {
		fmt.Println("HOST failed:", err)
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// serve answers one question.
func serve() error {
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}, {"/run", "tmpfs"}, {"/sys/kernel/security", "securityfs"}} {
		if err := unix.Mount(m[1], m[0], m[1], unix.MS_NOSUID, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[0], err)
		}
	}
	set, err := kmod.Open()
	if err != nil {
		return err
	}
	if err := set.LoadAll(); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	answer, err := work(port)
	if err != nil {
		answer = hostimage.Answer{Error: err.Error()}
	}
	if err := json.NewEncoder(port).Encode(answer); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

// openPort finds the port by its name. It opens it for blocking calls, which the
// driver's port serves better than Go's poller.
func openPort() (*os.File, error) {
	names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, file := range names {
		name, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(name)) != hostimage.Port {
			continue
		}
		path := "/dev/" + filepath.Base(filepath.Dir(file))
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return os.NewFile(uintptr(fd), path), nil
	}
	return nil, errors.New("the machine has no port " + hostimage.Port)
}

// work reads the question and lets foothold-host do what it asks.
func work(port *os.File) (a hostimage.Answer, err error) {
	line, err := bufio.NewReaderSize(port, maxQuestion).ReadSlice('\n')
	if err != nil {
		return a, fmt.Errorf("read question: %w", err)
	}
	var q hostimage.Question
	if err := json.Unmarshal(line, &q); err != nil {
		return a, fmt.Errorf("read question: %w", err)
	}
	if err := unix.Mount(disk, root, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return a, fmt.Errorf("mount OS disk: %w", err)
	}
	for _, word := range hostimage.Phases {
		if err := phase(word); err != nil {
			return a, fmt.Errorf("measure phase %s: %w", word, err)
		}
	}
	if a.Modules, err = loadModules(); err != nil {
		return a, err
	}
	if err := agent("enroll", "--tpm", hostimage.TPMDevice, "--name", hostimage.HostName, "--api", "192.0.2.1:7443",
		"--location", hostimage.Location, "--asset", "LAB-0002", "--software", hostimage.Release, "--out", hostimage.EntryFile); err != nil {
		return a, err
	}
	if err := agent("quote", "--tpm", hostimage.TPMDevice, "--host", hostimage.EntryFile, "--nonce", q.Nonce.String(), "--out", "/run/quote"); err != nil {
		return a, err
	}
	if a.Entry, err = os.ReadFile(hostimage.EntryFile); err != nil {
		return a, fmt.Errorf("read entry: %w", err)
	}
	if a.Quote, err = os.ReadFile("/run/quote"); err != nil {
		return a, fmt.Errorf("read quote: %w", err)
	}
	if err := publish(a.Entry); err != nil {
		return a, err
	}
	a.Served, err = ask(q.Nonce)
	return a, err
}

// publish signs the inventory that the agent takes its TPM's keys from.
func publish(entry []byte) error {
	var h inventory.Host
	if err := json.Unmarshal(entry, &h); err != nil {
		return fmt.Errorf("read entry: %w", err)
	}
	env, err := enroll.Publish(hostimage.Provider(), "provider", 1, time.Now(), 24*time.Hour, []inventory.Host{h})
	if err != nil {
		return err
	}
	data, err := json.Marshal(env)
	if err != nil {
		return fmt.Errorf("publish inventory: %w", err)
	}
	if err := os.WriteFile(hostimage.InventoryFile, data, 0o600); err != nil {
		return fmt.Errorf("publish inventory: %w", err)
	}
	return nil
}

// loadModules loads every module of the OS disk, in the order of their names.
func loadModules() ([]string, error) {
	files, err := filepath.Glob(root + "/modules/*.ko")
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("load module: %w", err)
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("load module %s: %w", file, err)
		}
	}
	return files, nil
}

// agent runs foothold-host to its end.
func agent(args ...string) error {
	out, err := exec.Command(root+"/foothold-host", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("foothold-host %s: %w: %s", args[0], err, strings.TrimSpace(string(out)))
	}
	return nil
}

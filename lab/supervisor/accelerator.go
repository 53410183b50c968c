package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/durable"
	"foothold/lab"
	"foothold/lab/ground"
)

// kvmProbe is how long KVM may take to bring a Linux kernel to its end. Where it
// works that takes about one second.
const kvmProbe = 3 * time.Second

// accelFile remembers what the probe found, for one boot of the machine.
const accelFile = "accelerator.json"

type accelRecord struct {
	BootID string `json:"boot_id"`
	Accel  string `json:"accel"`
}

// accelerator is kvm where it really runs a Linux guest, else tcg. That /dev/kvm
// opens proves nothing: there are machines on which a few instructions run and a
// kernel hangs.
func accelerator(ctx context.Context, state lab.State, cache string) (string, error) {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return lab.TCG, nil
	}
	unix.Close(fd)
	file := filepath.Join(state.Dir, accelFile)
	var last accelRecord
	if data, err := os.ReadFile(file); err == nil && json.Unmarshal(data, &last) == nil &&
		last.BootID == bootID() && (last.Accel == lab.KVM || last.Accel == lab.TCG) {
		return last.Accel, nil
	}
	kernel, err := bootimage.FetchKernel(ctx, cache, nil)
	if err != nil {
		return "", err
	}
	found := accelRecord{BootID: bootID(), Accel: lab.TCG}
	if kvmBoots(ctx, kernel.Image()) {
		found.Accel = lab.KVM
	}
	data, err := json.Marshal(found)
	if err != nil {
		return "", err
	}
	return found.Accel, durable.WriteFile(file, data, 0o600)
}

// kvmBoots says whether the kernel reaches the point where it misses its root file
// system, which is as far as it can come with none.
func kvmBoots(ctx context.Context, kernel string) bool {
	ctx, cancel := context.WithTimeout(ctx, kvmProbe)
	defer cancel()
	cmd, err := command.New(ctx, ground.QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm",
		"-machine", "q35", "-cpu", "host", "-m", "256M", "-bios", ground.BIOSFile, "-no-reboot",
		"-kernel", kernel, "-append", "console=ttyS0 panic=-1", "-serial", "stdio")
	if err != nil {
		return false
	}
	cmd.WaitDelay = time.Second
	out, err := command.Wait(cmd)
	return err == nil && bytes.Contains(out, []byte("Kernel panic - not syncing: VFS"))
}

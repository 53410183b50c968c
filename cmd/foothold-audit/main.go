// Foothold-audit is the first process of a host audit's medium: booted on a physical host
// of the provider's from media that the tenant trusts, it asks the TPM, prints the signed
// report on the console, and powers the machine off. It knows no option and no argument,
// has no network and mounts no disk.
package main

import (
	"fmt"
	"os"
	"time"

	"foothold/guest/auditor"
	"foothold/guest/pid1"
	"foothold/internal/kmod"
	"foothold/internal/tpm"
	"foothold/protocol/hostaudit"

	"golang.org/x/sys/unix"
)

// device is the host's TPM, directly: nothing else runs.
const device = "/dev/tpm0"

// firmwareSays is where the kernel shows what the firmware states of the machine.
const firmwareSays = "/sys/class/dmi/id"

// tpmTimeout bounds the wait for the TPM's driver.
const tpmTimeout = 30 * time.Second

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "foothold-audit: runs only as the first process of a host audit's medium; make one by `foothold inventory audit prepare`")
		os.Exit(2)
	}
	console := pid1.Console{Name: "foothold-audit"}
	if err := run(console); err != nil {
		console.Say("FAILED %v", err)
	}
	drain()
	if err := pid1.PowerOff(); err != nil {
		console.Say("cannot power off: %v", err)
	}
	select {} // a first process that ends is a kernel panic
}

func run(console pid1.Console) error {
	if err := pid1.Mount(); err != nil {
		return err
	}
	modules, err := kmod.Open()
	if err != nil {
		return err
	}
	if err := modules.LoadAll(); err != nil {
		return err
	}
	medium, key, err := auditor.ReadMedium(hostaudit.MediumFile)
	if err != nil {
		return err
	}
	console.Say("audit %s of host %s", medium.Order.Number, medium.Order.Host)
	if err := appears(device); err != nil {
		return err
	}
	dev, err := tpm.Open(device)
	if err != nil {
		return err
	}
	defer dev.Close()
	report := auditor.Examine(dev, medium.Order)
	auditor.Describe(&report, firmwareSays)
	for _, problem := range report.Problems {
		console.Say("not asked: %s", problem)
	}
	env, err := auditor.Sign(key, report)
	if err != nil {
		return err
	}
	text, err := hostaudit.Print(env)
	if err != nil {
		return err
	}
	fmt.Print(text)
	console.Say("done: take what stands between the two marks to `foothold inventory audit check`")
	return nil
}

// appears waits for a device that the kernel is still about to find.
func appears(path string) error {
	for end := pid1.Uptime() + tpmTimeout; ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		if pid1.Uptime() > end {
			return fmt.Errorf("this machine shows no TPM at %s: is it switched on in the firmware's settings?", path)
		}
	}
}

// drain waits until the console has sent what was written to it.
func drain() {
	unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1) // tcdrain(3)
}

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/lab/plainboot"
	"foothold/protocol/api"
	"foothold/tenant/policy"
	"foothold/tenant/template"
)

// phaseNames are the parts of a creation, in their order.
var phaseNames = []string{"reserved", "booting", "unlocking", "connecting", "ready"}

// measureBoots creates VMs one after the other, each after a plain boot, and ends them
// under traffic.
func measureBoots(ctx context.Context, l *labState, o options) (results []Result, err error) {
	var vms []api.VM
	var plain, revoked []float64
	var peer plainboot.Options
	if o.wants("boots") {
		if peer, err = preparePlain(ctx, l); err != nil {
			return nil, err
		}
	}
	fetches, err := l.revoker(ctx)
	if err != nil {
		return nil, err
	}
	defer fetches.close()
	for i := range o.vms {
		if o.wants("boots") {
			say("plain boot %d of %d", i+1, o.vms)
			r, err := plainboot.Run(ctx, peer)
			if err != nil {
				return nil, fmt.Errorf("%w\n%s", err, r.Console)
			}
			plain = append(plain, r.Answer.Seconds())
			say("  %.1f s", r.Answer.Seconds())
		}
		say("VM %d of %d", i+1, o.vms)
		vm, err := l.create(ctx, fmt.Sprintf("bench-%d", i))
		if err != nil {
			return nil, err
		}
		ms, err := l.revoke(ctx, fetches, vm)
		if err != nil {
			return nil, err
		}
		say("  %.1f s, revoked in %.0f ms", lasted(vm, "ready"), ms)
		vms, revoked = append(vms, vm), append(revoked, ms)
	}
	if o.wants("boots") {
		results = summary(vms, median(plain))
	}
	if o.wants("revocation") {
		results = append(results, revocations(revoked))
	}
	return results, nil
}

// summary makes results of the VMs and the plain boot's median.
func summary(vms []api.VM, plain float64) []Result {
	const peer = "plain boot"
	over := func(f func(api.VM) float64) float64 {
		var values []float64
		for _, vm := range vms {
			values = append(values, f(vm))
		}
		return median(values)
	}
	ready := over(func(vm api.VM) float64 { return lasted(vm, "ready") })
	ratio := 0.0
	if plain > 0 {
		ratio = ready / plain
	}
	results := []Result{
		atMost("create to ready, p50", ready, "s", aimCreate).against(peer, plain),
		atMost("create to ready, times the plain boot", round(ratio), "times", aimRatio),
		Result{Name: "create to computing, p50", Value: over(func(vm api.VM) float64 { return lasted(vm, "connecting") }), Unit: "s"}.against(peer, plain),
	}
	for _, name := range phaseNames {
		results = append(results, Result{Name: "phase " + name + ", p50", Unit: "s", Value: over(func(vm api.VM) float64 { return phase(vm, name).Seconds })})
	}
	held := over(func(vm api.VM) float64 { return vm.TPMHeld * 1000 })
	return append(results, atMost("TPM held for a VM, p50", held, "ms", aimTPMHeld))
}

// lasted is the time from a VM's reservation to the end of a phase, in seconds.
func lasted(vm api.VM, name string) float64 {
	end := phase(vm, name).End
	if end.IsZero() || len(vm.Phases) == 0 {
		return 0
	}
	return round(end.Sub(vm.Phases[0].Start).Seconds())
}

func phase(vm api.VM, name string) api.Phase {
	for _, p := range vm.Phases {
		if p.Name == name {
			return p
		}
	}
	return api.Phase{}
}

// preparePlain makes what plain boots take: the decrypted root, an empty volume of the
// VMs' size, and the first process.
func preparePlain(ctx context.Context, l *labState) (plainboot.Options, error) {
	var o plainboot.Options
	say("preparing plain boots")
	t, err := template.Open(filepath.Join(l.build, "templates", "debian"))
	if err != nil {
		return o, err
	}
	size, err := policy.SizeOf(policy.DefaultSize)
	if err != nil {
		return o, err
	}
	o = plainboot.Options{Workload: filepath.Join(l.bin, "sample-web"), WorkDir: l.work, MemoryMiB: size.MemoryMiB,
		Disk: filepath.Join(l.work, "plain.img"), Volume: filepath.Join(l.work, "volume.img"), Init: filepath.Join(l.work, "plain-init")}
	if err := t.Plain(o.Disk); err != nil {
		return o, err
	}
	if err := os.WriteFile(o.Volume, nil, 0o600); err != nil {
		return o, err
	}
	if err := os.Truncate(o.Volume, 1<<30); err != nil {
		return o, err
	}
	if err := command.Run(ctx, "mkfs.ext4", "-q", "-E", "nodiscard", o.Volume); err != nil {
		return o, err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", o.Init, "foothold/lab/plainboot/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return o, fmt.Errorf("build the plain boot's first process: %w\n%s", err, out)
	}
	if o.Kernel, err = bootimage.FetchKernel(ctx, filepath.Join(l.build, "cache"), nil); err != nil {
		return o, err
	}
	status, err := l.status(ctx)
	if err != nil {
		return o, err
	}
	o.Accel = status.Accel
	return o, nil
}

// began is when the run began, for progress.
var began = time.Now()

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", since(began), fmt.Sprintf(format, args...))
}

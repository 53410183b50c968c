package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"foothold/client"
	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/lab/control"
	"foothold/lab/plainboot"
	"foothold/protocol/api"
	"foothold/tenant/policy"
	"foothold/tenant/template"
)

// phaseNames are the parts of a creation, in their order.
var phaseNames = []string{"reserved", "booting", "unlocking", "connecting", "ready"}

// boots measures VMs and plain boots in a lab of its own.
type boots struct {
	bin, build, work, state string
	plain                   plainboot.Options
}

func measureBoots(ctx context.Context, bin, build, work string, n int) ([]Result, error) {
	b := &boots{work: work, state: filepath.Join(work, "lab")}
	for _, p := range []struct {
		to   *string
		from string
	}{{&b.bin, bin}, {&b.build, build}} {
		abs, err := filepath.Abs(p.from)
		if err != nil {
			return nil, err
		}
		*p.to = abs
	}
	defer b.foothold(context.WithoutCancel(ctx), nil, "lab", "down", "--state", b.state)
	say("bringing a lab up")
	if err := b.foothold(ctx, nil, "lab", "up", "--state", b.state); err != nil {
		return nil, err
	}
	say("building and registering the template")
	if err := b.foothold(ctx, nil, "template", "build", "debian", "--cache", filepath.Join(b.build, "cache"), "--dir", filepath.Join(b.build, "templates")); err != nil {
		return nil, err
	}
	if err := b.preparePlain(ctx); err != nil {
		return nil, err
	}
	var vms []api.VM
	var plain []float64
	for i := range n {
		say("plain boot %d of %d", i+1, n)
		r, err := plainboot.Run(ctx, b.plain)
		if err != nil {
			return nil, fmt.Errorf("%w\n%s", err, r.Console)
		}
		plain = append(plain, r.Answer.Seconds())
		say("  %.1f s; VM %d of %d", r.Answer.Seconds(), i+1, n)
		vm, err := b.create(ctx, fmt.Sprintf("bench-%d", i))
		if err != nil {
			return nil, err
		}
		say("  %.1f s", lasted(vm, "ready"))
		vms = append(vms, vm)
	}
	return summary(vms, median(plain)), nil
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

// create makes a VM, waits until it is ready, and deletes it.
func (b *boots) create(ctx context.Context, name string) (vm api.VM, err error) {
	var out bytes.Buffer
	if err := b.foothold(ctx, &out, "vm", "create", name, "--workload", filepath.Join(b.bin, "sample-web"), "--wait", "--json"); err != nil {
		return vm, fmt.Errorf("%w\n%s", err, out.String())
	}
	if err := json.Unmarshal(out.Bytes(), &vm); err != nil {
		return vm, fmt.Errorf("read VM: %w", err)
	}
	if lasted(vm, "ready") == 0 {
		return vm, fmt.Errorf("VM %s names no end of phase ready", name)
	}
	return vm, b.foothold(ctx, nil, "vm", "delete", name, "--yes")
}

// foothold runs the command line against this lab; standard output goes to out.
func (b *boots) foothold(ctx context.Context, out *bytes.Buffer, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "foothold"), args...)
	cmd.Env = append(os.Environ(), client.Variable+"="+filepath.Join(b.state, "context.yaml"), "XDG_STATE_HOME="+filepath.Join(b.state, "user"))
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if out != nil {
		cmd.Stdout = out
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("foothold %s: %w\n%s", args[0], err, errs.String())
	}
	return nil
}

// preparePlain makes what plain boots take: the decrypted root, an empty volume of the
// VMs' size, and the first process.
func (b *boots) preparePlain(ctx context.Context) error {
	say("preparing plain boots")
	t, err := template.Open(filepath.Join(b.build, "templates", "debian"))
	if err != nil {
		return err
	}
	size, err := policy.SizeOf(policy.DefaultSize)
	if err != nil {
		return err
	}
	o := plainboot.Options{Workload: filepath.Join(b.bin, "sample-web"), WorkDir: b.work, MemoryMiB: size.MemoryMiB,
		Disk: filepath.Join(b.work, "plain.img"), Volume: filepath.Join(b.work, "volume.img"), Init: filepath.Join(b.work, "plain-init")}
	if err := t.Plain(o.Disk); err != nil {
		return err
	}
	if err := os.WriteFile(o.Volume, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(o.Volume, 1<<30); err != nil {
		return err
	}
	if err := command.Run(ctx, "mkfs.ext4", "-q", "-E", "nodiscard", o.Volume); err != nil {
		return err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", o.Init, "foothold/lab/plainboot/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the plain boot's first process: %w\n%s", err, out)
	}
	if o.Kernel, err = bootimage.FetchKernel(ctx, filepath.Join(b.build, "cache"), nil); err != nil {
		return err
	}
	reply, err := control.Call(ctx, filepath.Join(b.state, "run"), control.Request{Op: control.OpStatus})
	if err != nil {
		return err
	}
	o.Accel = reply.Status.Accel
	b.plain = o
	return nil
}

// began is when the run began, for progress.
var began = time.Now()

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", since(began), fmt.Sprintf(format, args...))
}

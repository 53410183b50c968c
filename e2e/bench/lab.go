package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"foothold/client"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/protocol/api"
)

// labState is a lab of this run's own, with the default template in it.
type labState struct {
	bin, build, work string // folders, absolute
	patience         int
	state            lab.State
	api              *client.Client
}

// labMeasures are those that need a lab.
var labMeasures = []string{"boots", "revocation", "refusal", "restarts"}

// measureInLab brings a lab up, takes the wanted measurements in it, and ends it.
func measureInLab(ctx context.Context, o options) (results []Result, err error) {
	l := &labState{work: o.work, patience: o.patience}
	for _, p := range []struct {
		to   *string
		from string
	}{{&l.bin, o.bin}, {&l.build, o.build}} {
		if *p.to, err = filepath.Abs(p.from); err != nil {
			return nil, err
		}
	}
	if l.state, err = lab.Open(filepath.Join(o.work, "lab")); err != nil {
		return nil, err
	}
	defer l.foothold(context.WithoutCancel(ctx), nil, "lab", "down", "--state", l.state.Dir)
	if err := l.up(ctx); err != nil {
		return nil, err
	}
	if o.wants("boots") || o.wants("revocation") {
		if results, err = measureBoots(ctx, l, o); err != nil {
			return nil, err
		}
	}
	if o.wants("refusal") {
		refusals, err := measureRefusals(ctx, l)
		if err != nil {
			return nil, err
		}
		results = append(results, refusals...)
	}
	if o.wants("restarts") {
		restarts, err := measureRestarts(ctx, l)
		if err != nil {
			return nil, err
		}
		results = append(results, restarts...)
	}
	return results, nil
}

func (l *labState) up(ctx context.Context) error {
	say("bringing a lab up")
	if err := l.foothold(ctx, nil, "lab", "up", "--state", l.state.Dir, "--patience", strconv.Itoa(l.patience)); err != nil {
		return err
	}
	say("building and registering the template")
	if err := l.foothold(ctx, nil, "template", "build", "debian", "--cache", filepath.Join(l.build, "cache"), "--dir", filepath.Join(l.build, "templates")); err != nil {
		return err
	}
	found, err := client.Find(l.state.Context())
	if err != nil {
		return err
	}
	l.api, err = client.Dial(found)
	return err
}

// create makes a VM and waits until it is ready.
func (l *labState) create(ctx context.Context, name string) (vm api.VM, err error) {
	var out bytes.Buffer
	if err := l.foothold(ctx, &out, "vm", "create", name, "--workload", filepath.Join(l.bin, "sample-web"), "--wait", "--json"); err != nil {
		return vm, fmt.Errorf("%w\n%s", err, out.String())
	}
	if err := json.Unmarshal(out.Bytes(), &vm); err != nil {
		return vm, fmt.Errorf("read VM: %w", err)
	}
	if lasted(vm, "ready") == 0 {
		return vm, fmt.Errorf("VM %s names no end of phase ready", name)
	}
	return vm, nil
}

// delete deletes a VM and waits until it is cleaned up.
func (l *labState) delete(ctx context.Context, name string) error {
	return l.foothold(ctx, nil, "vm", "delete", name, "--yes")
}

// status is what the lab's supervisor says.
func (l *labState) status(ctx context.Context) (control.Status, error) {
	reply, err := control.Call(ctx, l.state.Run(), control.Request{Op: control.OpStatus})
	if err != nil {
		return control.Status{}, err
	}
	return *reply.Status, nil
}

// foothold runs the command line against this lab; standard output goes to out.
func (l *labState) foothold(ctx context.Context, out *bytes.Buffer, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(l.bin, "foothold"), args...)
	cmd.Env = append(os.Environ(), client.Variable+"="+l.state.Context(), "XDG_STATE_HOME="+filepath.Join(l.state.Dir, "user"))
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

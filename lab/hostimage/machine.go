package hostimage

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"foothold/internal/command"
	"foothold/internal/tpm/swtpm"
	"foothold/protocol/digest"
	"foothold/provider/qemu"
)

// maxAnswer bounds an answer in bytes: two logs in base64, twice encoded as JSON, and room.
const maxAnswer = 64 << 20

// Run is one boot of a host.
type Run struct {
	Answer  Answer
	Took    time.Duration // from power on to the answer
	Console string
}

// Boot powers on the machine with the TPM in tpmDir (package swtpm made it), asks for one
// quote, and returns when the machine is off. Firmware variables begin empty each time.
func Boot(ctx context.Context, image Image, tpmDir string, nonce digest.SHA256) (run Run, err error) {
	work, err := os.MkdirTemp("", "foothold-") // sockets' paths are short
	if err != nil {
		return run, fmt.Errorf("boot host: %w", err)
	}
	defer os.RemoveAll(work)
	runtime.LockOSThread() // the TPM ends with the thread that starts it
	defer runtime.UnlockOSThread()
	tpm, err := swtpm.StartFor(ctx, tpmDir, filepath.Join(work, "tpm"))
	if err != nil {
		return run, err
	}
	defer tpm.Stop()
	variables := filepath.Join(work, "variables")
	if err := copyFile(variables, image.Variables, 0o600); err != nil {
		return run, fmt.Errorf("boot host: %w", err)
	}
	port, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(work, "port"), Net: "unix"})
	if err != nil {
		return run, fmt.Errorf("boot host: %w", err)
	}
	defer port.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd, err := command.New(ctx, "qemu-system-x86_64", arguments(image, work)...)
	if err != nil {
		return run, err
	}
	var console bytes.Buffer
	cmd.Stdout = &console
	start, ended := time.Now(), make(chan error, 1)
	go func() {
		_, err := command.Wait(cmd)
		port.Close() // nobody will come any more
		ended <- err
	}()
	run.Answer, err = ask(ctx, port, nonce)
	run.Took = time.Since(start)
	if err != nil {
		cancel()
	}
	err = errors.Join(err, <-ended)
	run.Console = strings.ReplaceAll(console.String(), "\r", "")
	if err == nil && run.Answer.Error != "" {
		err = errors.New(run.Answer.Error)
	}
	if err != nil {
		return run, fmt.Errorf("boot host: %w", err)
	}
	return run, nil
}

// arguments are QEMU's. The OS disk is the first virtio disk.
func arguments(image Image, work string) []string {
	return []string{"-machine", "q35,accel=tcg,smm=off", "-cpu", qemu.EmulatedCPU, "-smp", "1", "-m", "512",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-drive", "if=pflash,format=raw,readonly=on,file=" + image.Firmware,
		"-drive", "if=pflash,format=raw,file=" + filepath.Join(work, "variables"),
		"-chardev", "socket,id=tpm,path=" + filepath.Join(work, "tpm"), "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm",
		"-drive", "if=none,id=os,format=raw,readonly=on,file=" + image.Disk, "-device", "virtio-blk-pci,drive=os",
		"-drive", "if=none,id=esp,format=raw,readonly=on,file=fat:" + image.ESP, "-device", "virtio-blk-pci,drive=esp,bootindex=1",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=port,path=" + filepath.Join(work, "port"),
		"-device", "virtserialport,chardev=port,name=" + Port,
	}
}

// ask has one exchange with the machine, which connects when it is powered on.
func ask(ctx context.Context, port *net.UnixListener, nonce digest.SHA256) (a Answer, err error) {
	conn, err := port.Accept()
	if err != nil {
		return a, fmt.Errorf("the machine did not start: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := json.NewEncoder(conn).Encode(Question{Nonce: nonce}); err != nil {
		return a, fmt.Errorf("ask the machine: %w", err)
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxAnswer)
	if !lines.Scan() {
		return a, errors.Join(errors.New("the machine ended, or time was up, before it answered"), lines.Err(), context.Cause(ctx))
	}
	if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
		return a, fmt.Errorf("read the machine's answer: %w", err)
	}
	return a, nil
}

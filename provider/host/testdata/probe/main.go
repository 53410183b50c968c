// Command probe is the first process of a VM in the host agent's tests. It plays loader and boot server
// in one: it drives its own quote through the local channel. The VM's name says how it
// behaves.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"foothold/internal/kmod"
	"foothold/internal/tpm"
	"foothold/protocol/channel"
	"foothold/protocol/digest"
	"foothold/protocol/frame"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
	"github.com/vishvananda/netlink"
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
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if err := unix.Mount(m[1], m[0], m[1], 0, ""); err != nil {
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
	spec, t1, err := settings()
	if err != nil {
		return err
	}
	if t1.Digest() != spec.TokenDigest {
		return errors.New("T1 is not the one that the settings hold")
	}
	if _, err := os.Stat("/dev/tpm0"); err == nil {
		return errors.New("the VM has a TPM")
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	fmt.Println("PROBE starts as", spec.Name)
	switch spec.Name {
	case "silent":
		rest()
	case "listening":
		return listen()
	case "shutdown":
		return nil
	case "reset":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "unasked":
		frame.Write(port, channel.MaxFrame, channel.Message{Type: channel.Handover})
		rest()
	}
	if err := disks(); err != nil {
		return err
	}
	if err := boot(port); err != nil {
		return err
	}
	if spec.Name == "talkative" {
		port.Write([]byte("\x00\x00\x00\x02{}"))
		rest()
	}
	switch spec.Name {
	case "powers-off":
		return nil
	case "reboots":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "crashes":
		return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) // Linux, admin-guide/sysrq
	}
	if err := network(spec); err != nil {
		return err
	}
	rest() // computes until it is destroyed
	return nil
}

// listenTime is how long a VM waits for somebody to type at its console.
const listenTime = 5 * time.Second

// listen tells what comes in by the console.
func listen() error {
	console, err := os.OpenFile("/dev/ttyS0", os.O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	heard := make(chan string)
	go func() {
		line := make([]byte, 256)
		n, err := console.Read(line)
		heard <- fmt.Sprintf("%q, %v", line[:n], err)
	}()
	fmt.Println("PROBE listens")
	select {
	case what := <-heard:
		fmt.Println("PROBE heard", what)
	case <-time.After(listenTime):
		fmt.Println("PROBE heard nothing")
	}
	return nil
}

func rest() {
	for {
		time.Sleep(time.Hour)
	}
}

func settings() (spec vmspec.Spec, t1 token.Token, err error) {
	const items = "/sys/firmware/qemu_fw_cfg/by_name/"
	data, err := os.ReadFile(items + vmspec.FwCfgSettings + "/raw")
	if err != nil {
		return spec, t1, err
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		return spec, t1, err
	}
	text, err := os.ReadFile(items + vmspec.FwCfgToken + "/raw")
	if err != nil {
		return spec, t1, err
	}
	t1, err = token.Parse(token.T1, string(text))
	return spec, t1, err
}

func openPort() (*os.File, error) {
	ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, p := range ports {
		if name, _ := os.ReadFile(p); strings.TrimSpace(string(name)) == vmspec.ChannelPort {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(p)), os.O_RDWR, 0)
		}
	}
	return nil, errors.New("no local channel")
}

// disks finds both by serial; the template must be read-only, the volume writable.
func disks() error {
	for dev, serial := range map[string]string{"vda": "template", "vdb": "volume"} {
		got, err := os.ReadFile("/sys/block/" + dev + "/serial")
		if err != nil || string(got) != serial {
			return fmt.Errorf("disk %s has serial %q, %v", dev, got, err)
		}
	}
	template, err := os.ReadFile("/dev/vda")
	if err != nil || !bytes.HasPrefix(template, []byte("template")) {
		return fmt.Errorf("template: %d bytes, %v", len(template), err)
	}
	if f, err := os.OpenFile("/dev/vda", os.O_WRONLY, 0); err == nil {
		_, err = f.Write(make([]byte, 512))
		if serr := f.Sync(); err == nil && serr == nil {
			return errors.New("the template is writable")
		}
	}
	f, err := os.OpenFile("/dev/vdb", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	first := make([]byte, 7)
	if _, err := io.ReadFull(f, first); err != nil {
		return err
	}
	fmt.Printf("PROBE volume holds %q\n", first)
	if _, err := f.WriteAt([]byte("written"), 0); err != nil {
		return err
	}
	return f.Sync()
}

// host is the channel as go-tpm's transport.
type host struct{ port *os.File }

func (h host) ask(m channel.Message, want channel.Type) (channel.Message, error) {
	if err := frame.Write(h.port, channel.MaxFrame, m); err != nil {
		return m, err
	}
	var answer channel.Message
	if err := frame.Read(h.port, channel.MaxFrame, &answer); err != nil {
		return m, err
	}
	if answer.Type != want {
		return m, fmt.Errorf("the host says %s %s, want %s", answer.Type, answer.Reason, want)
	}
	return answer, nil
}

func (h host) Send(command []byte) ([]byte, error) {
	m, err := h.ask(channel.Message{Type: channel.Command, Data: command}, channel.Response)
	return m.Data, err
}

func boot(port *os.File) error {
	h := host{port}
	asked, err := h.ask(channel.Message{Type: channel.TunnelUp}, channel.AskTunnel)
	if err != nil {
		return err
	}
	tunnel := digest.Of([]byte("tunnel"))
	if _, err := h.ask(channel.Message{Type: channel.Tunnel, Challenge: asked.Challenge, Measurement: &tunnel}, channel.Ready); err != nil {
		return err
	}
	if err := quote(h); err != nil {
		return err
	}
	if _, err := h.ask(channel.Message{Type: channel.Handover}, channel.Released); err != nil {
		return err
	}
	fmt.Println("PROBE released")
	return nil
}

// quote is the boot server's part; the host's public keys come with the command line.
func quote(h host) error {
	session, err := key("session", inventory.SessionHandle)
	if err != nil {
		return err
	}
	aik, err := key("aik", inventory.AIKHandle)
	if err != nil {
		return err
	}
	s, closeSession, err := tpm2.HMACSession(h, tpm2.TPMAlgSHA256, 16, tpm2.Salted(session.Handle, session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	if err != nil {
		return err
	}
	data := digest.Of([]byte("binding"))
	var selection []uint
	for _, i := range pcr.BootSelection() {
		selection = append(selection, uint(i))
	}
	rsp, err := tpm2.Quote{
		SignHandle:     aik.Auth(s),
		QualifyingData: tpm2.TPM2BData{Buffer: data[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(selection...)}}},
	}.Execute(h)
	if err != nil {
		return err
	}
	attest, err := rsp.Quoted.Contents()
	if err != nil {
		return err
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return err
	}
	fmt.Printf("PROBE quote %x\n", info.PCRDigest.Buffer)
	return closeSession()
}

// key reads probe.NAME= of the kernel's command line.
func key(name string, handle tpm2.TPMHandle) (tpm.Key, error) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return tpm.Key{}, err
	}
	for _, word := range strings.Fields(string(cmdline)) {
		text, ok := strings.CutPrefix(word, "probe."+name+"=")
		if !ok {
			continue
		}
		data, err := base64.RawURLEncoding.DecodeString(text)
		if err != nil {
			return tpm.Key{}, err
		}
		pub, err := tpm.ParsePublic(data)
		if err != nil {
			return tpm.Key{}, err
		}
		object, err := tpm2.ObjectName(pub)
		if err != nil {
			return tpm.Key{}, err
		}
		return tpm.Key{Handle: handle, Name: *object, Public: *pub}, nil
	}
	return tpm.Key{}, fmt.Errorf("no key %s on the command line", name)
}

// network sets the address of the settings and calls the gateway.
func network(spec vmspec.Spec) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if mac := link.Attrs().HardwareAddr.String(); mac != spec.Network.MAC {
		return fmt.Errorf("eth0 is %s", mac)
	}
	addr, err := netlink.ParseAddr(spec.Network.Address.String())
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	if spec.Name == "spoofing" {
		other, _ := net.ParseMAC("02:f0:00:00:99:99")
		if err := netlink.LinkSetHardwareAddr(link, other); err != nil {
			return err
		}
	}
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(spec.Network.Gateway.String(), "80"), 20*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = fmt.Fprintln(conn, spec.Name)
	fmt.Println("PROBE connected")
	return err
}

package ground

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/signingkey"
	"foothold/lab"
	"foothold/protocol/digest"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
	"foothold/provider/host"
	"foothold/provider/qemu"
)

// RunDir is where a booted host has its platform's files: copied from the release by
// the launcher, measured there, and unchangeable afterwards. It lies in the lab's own
// /run.
const RunDir = "/run/platform"

// TPMSocket is where the host's TPM listens, in the lab's own /run.
const TPMSocket = "/run/tpm/socket"

// Names of the release's files, in the order in which they are measured.
const (
	Agent           = "foothold-host"
	QEMU            = "qemu-system-x86_64"
	QEMUModule      = "qemu-tcg"
	BIOS            = "bios"
	LoaderKernel    = "loader-kernel"
	LoaderInitramfs = "loader-initramfs"
	HostConfig      = "host-config"
)

// PlatformFiles lists the files that the release holds, in the order of measurement.
func PlatformFiles() []string {
	return []string{Agent, QEMU, QEMUModule, BIOS, LoaderKernel, LoaderInitramfs, HostConfig}
}

// ReleaseDir is the installed release; the launcher boots the host from it.
func ReleaseDir(s lab.State) string { return s.Provider("release") }

// loaderCmdline is what the loader's kernel gets; it is measured.
const loaderCmdline = bootimage.LoaderCmdline

// BIOSFile is the firmware of VMs, as its package installs it.
const BIOSFile = "/usr/share/qemu/qboot.rom"

// qemuModule is QEMU's TCG accelerator, which Debian builds as a module.
var qemuModule = filepath.Join(qemu.ModuleDir, qemu.TCGModule)

// releaseLifetime is how long the tenant's reference values for a release hold.
const releaseLifetime = 365 * 24 * time.Hour

// recordFile notes what the installed release was made from.
const recordFile = "release.json"

// sources identifies what a release is made from. The lab installs a new release when
// they change, as a provider does with an update; it never looks at the installed
// files again, so whoever changes one of those is found out by the quote.
type sources struct {
	Agent  digest.SHA256 `json:"agent"`
	Loader digest.SHA256 `json:"loader"`
	QEMU   digest.SHA256 `json:"qemu"`
	Module digest.SHA256 `json:"module"`
	BIOS   digest.SHA256 `json:"bios"`
	Config digest.SHA256 `json:"config"`
	System digest.SHA256 `json:"system"` // QEMU's libraries and ROMs
}

// hostConfig is the host agent's configuration. It is measured, so it names files
// that may be renewed, certificates for instance, by path alone.
func (m *maker) hostConfig() host.Config {
	tls := func(file string) string { return m.Provider("tls", file) }
	return host.Config{
		Name: HostName, State: m.Provider("state"), Listen: at(lab.Host, lab.MgmtLAN, hostPort),
		TLS:     mtls.Files{Cert: tls("host.crt"), Key: tls("host.key"), CA: tls("tenant-ca.crt")},
		Tenants: []host.Tenant{{Identity: TenantName, Tenant: TenantName}},
		TPM:     TPMSocket, Log: m.Provider("measurements.json"), Inventory: m.Provider("inventory.json"), InventoryKey: signingkey.Public(m.inventoryKey),
		QEMU: filepath.Join(RunDir, QEMU), QEMUModule: filepath.Join(RunDir, QEMUModule), BIOS: filepath.Join(RunDir, BIOS),
		LoaderKernel: filepath.Join(RunDir, LoaderKernel), LoaderInitramfs: filepath.Join(RunDir, LoaderInitramfs),
		LoaderCmdline: loaderCmdline, Bridge: lab.CloudBridge, Accel: m.Accel,
		BootTimeout: m.limit(bootLimit).String(), HoldTimeout: "5s",
	}
}

// installRelease assembles the provider's platform release where its sources changed,
// and signs the tenant's reference values for it.
func (m *maker) installRelease(ctx context.Context) error {
	conf, err := yaml.Marshal(m.hostConfig())
	if err != nil {
		return fmt.Errorf("encode host configuration: %w", err)
	}
	qemu, err := command.Find(QEMU)
	if err != nil {
		return err
	}
	system, err := systemFiles(ctx, qemu)
	if err != nil {
		return err
	}
	want := sources{Config: digest.Of(conf)}
	if want.System, err = digestOf(system); err != nil {
		return err
	}
	for path, d := range map[string]*digest.SHA256{
		m.binary(Agent): &want.Agent, m.binary("foothold-loader"): &want.Loader, qemu: &want.QEMU, qemuModule: &want.Module, BIOSFile: &want.BIOS,
	} {
		if *d, err = durable.Digest(path); err != nil {
			return err
		}
	}
	if m.installed() == want {
		return nil
	}
	// Until the record is written last the release counts as not installed.
	dir := ReleaseDir(m.State)
	if err := os.Remove(filepath.Join(dir, recordFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replace release: %w", err)
	}
	if err := m.assemble(ctx, dir, qemu, conf); err != nil {
		return err
	}
	if err := writeFiles(dir, system); err != nil {
		return err
	}
	if err := m.signPlatform(dir); err != nil {
		return err
	}
	record, err := json.Marshal(want)
	if err != nil {
		return fmt.Errorf("record release: %w", err)
	}
	return durable.WriteFile(filepath.Join(dir, recordFile), record, 0o644)
}

func (m *maker) binary(name string) string { return filepath.Join(m.Binaries, name) }

// installed is what the installed release was made from; the zero value when there is
// none.
func (m *maker) installed() sources {
	data, err := os.ReadFile(filepath.Join(ReleaseDir(m.State), recordFile))
	var s sources
	if err != nil || json.Unmarshal(data, &s) != nil {
		return sources{}
	}
	return s
}

func (m *maker) assemble(ctx context.Context, dir, qemu string, conf []byte) error {
	if err := folders(dir); err != nil {
		return err
	}
	kernel, err := bootimage.FetchKernel(ctx, m.Cache, nil)
	if err != nil {
		return err
	}
	images := m.Provider("loader")
	img, err := bootimage.BuildLoader(kernel, m.binary("foothold-loader"), images)
	if err != nil {
		return err
	}
	for name, from := range map[string]string{
		Agent: m.binary(Agent), QEMU: qemu, QEMUModule: qemuModule, BIOS: BIOSFile, LoaderKernel: img.Kernel.Path, LoaderInitramfs: img.Initramfs.Path,
	} {
		if err := install(from, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := durable.WriteFile(filepath.Join(dir, HostConfig), conf, 0o600); err != nil {
		return err
	}
	return os.RemoveAll(images)
}

func install(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	defer f.Close()
	return durable.Write(to, 0o700, func(w *os.File) error {
		_, err := io.Copy(w, f)
		return err
	})
}

// signPlatform states what the release's files hash to. In the lab the tenant has
// examined the release by having built it.
func (m *maker) signPlatform(dir string) error {
	measured, err := MeasuredFiles(dir)
	if err != nil {
		return err
	}
	sums := map[string]digest.SHA256{}
	var files []platform.File
	for _, f := range measured {
		path := f.Path
		if path == "" {
			path = filepath.Join(dir, f.Name)
		}
		sum, err := durable.Digest(path)
		if err != nil {
			return err
		}
		sums[f.Name] = sum
		files = append(files, platform.File{Name: f.Name, SHA256: sum})
	}
	list, err := json.Marshal(files)
	if err != nil {
		return fmt.Errorf("sign platform: %w", err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	manifest := platform.Manifest{
		Name: "lab-" + digest.Of(list).String()[:12], Profile: platform.Lab,
		ValidFrom: now.Add(-5 * time.Minute), ValidUntil: now.Add(releaseLifetime), Files: files,
		Firmware: vmspec.Firmware{
			BIOS: sums[BIOS], LoaderKernel: sums[LoaderKernel], LoaderInitramfs: sums[LoaderInitramfs], LoaderCmdline: loaderCmdline,
		},
	}
	payload, err := json.Marshal(manifest)
	if err != nil {
		return fmt.Errorf("sign platform: %w", err)
	}
	return writeEnvelope(m.Tenant("platform.json"), signed.Seal(m.platformKey, signed.Platform, payload))
}

func writeEnvelope(file string, e signed.Envelope) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return durable.WriteFile(file, data, 0o644)
}

// hostAddress is the host's management address.
func hostAddress() netip.AddrPort { return at(lab.Host, lab.MgmtLAN, hostPort) }

package expect

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
)

const (
	mac     = "02:00:00:00:00:0a"
	cmdline = "console=ttyS0 lockdown=integrity"
)

var (
	agentSum   = digest.Of([]byte("agent"))
	systemdSum = digest.Of([]byte("systemd"))
	workSum    = digest.Of([]byte("workload"))
	rootHash   = digest.Of([]byte("root"))
	salt       = strings.Repeat("ab", 32)
)

func template() Template {
	return Template{
		Kernel: "6.1.0-37-cloud-amd64", Agent: agentSum, Modules: []string{"dm_crypt", "dm_verity", "virtio_net", "wireguard"},
		Initramfs: Stage{
			Mounts: []Mount{{Source: "*", Target: "/", Type: "rootfs"}, {Source: "*", Target: "/proc", Type: "proc", Options: []string{"nosuid"}}},
			Files:  []File{{Path: "/init", SHA256: agentSum}, {Path: "/sbin/cryptsetup", SHA256: digest.Of([]byte("cryptsetup"))}},
		},
		OS: Stage{
			Programs: []Program{{Path: "/usr/lib/systemd/systemd", SHA256: systemdSum}},
			Mounts: []Mount{
				{Source: "*", Target: "/proc", Type: "proc"}, {Source: "overlay", Target: "/etc", Type: "overlay", Options: []string{"nosuid"}},
				{Source: SourceVolume, Target: "/var", Type: "ext4", Options: []string{"nosuid", "nodev"}},
				{Source: "*", Target: "/run/credentials/*.service", Type: "ramfs"},
			},
			Users: []User{{"root", 0, "/usr/sbin/nologin"}, {"nobody", 65534, "/usr/sbin/nologin"}},
			Files: []File{{Path: "/etc/hostname"}, {Path: "/etc/mtab", SHA256: digest.Of([]byte("../proc/self/mounts"))}},
		},
	}
}

func instance() Instance {
	return Instance{
		Name: "web-1", Nonce: []byte("0123456789abcdef"), Cmdline: cmdline,
		Network:    vmspec.Network{MAC: mac, Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		BootServer: netip.MustParseAddr("10.81.0.10"), Orchestrator: netip.MustParseAddr("10.80.0.10"), Gateway: netip.MustParseAddr("10.81.0.20"),
		TemplateSize: 128 << 20, VolumeSize: 1 << 30, RootHash: rootHash,
		Tunnel: netip.MustParseAddr("10.84.0.7"), TunnelPrefix: netip.MustParsePrefix("10.84.0.0/16"),
	}
}

// initramfs is the report of a VM that is as it should be before it is unlocked.
func initramfs() audit.Report {
	return audit.Report{
		Stage: audit.Initramfs, Nonce: []byte("0123456789abcdef"), Kernel: "6.1.0-37-cloud-amd64", Cmdline: cmdline, Hostname: "web-1",
		Files:      []audit.File{{Path: "/init", Mode: 0o100755, SHA256: agentSum}},
		Processes:  []audit.Process{{PID: 1, Exe: "/init", SHA256: agentSum}},
		Threads:    60,
		Modules:    []string{"dm_crypt", "virtio_net"},
		Listeners:  []audit.Listener{{Proto: "tcp", Address: "0.0.0.0", Port: 22, Exe: "/init"}},
		Mounts:     []audit.Mount{{Source: "rootfs", Target: "/", Type: "rootfs", Options: "rw"}, {Source: "proc", Target: "/proc", Type: "proc", Options: "rw,nosuid,nodev"}},
		Disks:      []audit.Disk{{Name: "loop0", Number: "7:0"}, {Name: "vda", Number: "254:0", Size: 128 << 20, ReadOnly: true}, {Name: "vdb", Number: "254:16", Size: 1 << 30}},
		Interfaces: []audit.Interface{{Name: "eth0", MAC: mac, Addresses: []string{"10.82.0.10/24"}, Up: true}, {Name: "lo", MAC: "00:00:00:00:00:00", Addresses: []string{"127.0.0.1/8"}}},
		Routes:     []string{"10.82.0.0/24 dev eth0", "default via 10.82.0.1 dev eth0"},
	}
}

// running is the report of a VM whose OS is up as it should be.
func running() audit.Report {
	r := initramfs()
	r.Stage = audit.OS
	r.Files = []audit.File{{Path: "/etc/hostname", Mode: 0o100644, SHA256: digest.Of([]byte("web-1"))}, {Path: "/etc/mtab", Mode: 0o120777, SHA256: digest.Of([]byte("../proc/self/mounts"))}}
	r.Processes = []audit.Process{{PID: 1, Exe: "/usr/lib/systemd/systemd", SHA256: systemdSum}, {PID: 90, Exe: "/memfd:foothold-agent (deleted)", SHA256: agentSum}}
	r.Modules = append(r.Modules, "dm_verity", "wireguard")
	r.Listeners = []audit.Listener{{Proto: "udp", Address: "0.0.0.0", Port: 40123}, {Proto: "udp6", Address: "::", Port: 40123}}
	r.Mounts = []audit.Mount{
		{Source: "/dev/mapper/os", Target: "/", Type: "erofs", Options: "ro,relatime"}, {Source: "overlay", Target: "/etc", Type: "overlay", Options: "rw,nosuid"},
		{Source: "proc", Target: "/proc", Type: "proc"}, {Source: "/dev/mapper/volume", Target: "/var", Type: "ext4", Options: "rw,nosuid,nodev"},
		{Source: "none", Target: "/run/credentials/systemd-sysctl.service", Type: "ramfs"},
	}
	r.Users = []audit.User{{Name: "nobody", UID: 65534, Shell: "/usr/sbin/nologin", Locked: true}, {Name: "root", UID: 0, Shell: "/usr/sbin/nologin", Locked: true}}
	r.Disks = append(r.Disks,
		audit.Disk{Name: "dm-0", Number: "253:0", Mapped: "template", Size: 128 << 20, ReadOnly: true, Table: "0 262144 crypt aes-xts-plain64 - 0 254:0 0 1 sector_size:4096"},
		audit.Disk{Name: "dm-1", Number: "253:1", Mapped: "os", Size: 120 << 20, ReadOnly: true, Table: "0 245760 verity 1 253:0 253:0 4096 4096 30720 30721 sha256 " + rootHash.String() + " " + salt},
		audit.Disk{Name: "dm-2", Number: "253:2", Mapped: "volume", Size: 1 << 30, Table: "0 2097152 crypt aes-xts-plain64 - 0 254:16 0 1 sector_size:4096"})
	r.Interfaces = append(r.Interfaces, audit.Interface{Name: "wg0", Addresses: []string{"10.84.0.7/32"}, Up: true})
	r.Routes = []string{"10.81.0.20 via 10.82.0.1 dev eth0", "10.82.0.0/24 dev eth0", "default dev wg0"}
	return r
}

func TestAsItShouldBe(t *testing.T) {
	if found := Initramfs(template(), instance(), initramfs()); len(found) != 0 {
		t.Errorf("initramfs: %v", found)
	}
	if found := OS(template(), instance(), running()); len(found) != 0 {
		t.Errorf("os: %v", found)
	}
	i, r := instance(), running()
	i.Workload = &Workload{SHA256: workSum, Port: 8080}
	r.Processes = append(r.Processes, audit.Process{PID: 200, UID: 61184, Exe: "/run/foothold/workload/run", SHA256: workSum})
	r.Listeners = append(r.Listeners, audit.Listener{Proto: "tcp", Port: 8080, Exe: "/run/foothold/workload/run"})
	if found := OS(template(), i, r); len(found) != 0 {
		t.Errorf("with workload: %v", found)
	}
	i.Former, i.Workload = []*Workload{i.Workload}, &Workload{SHA256: digest.Of([]byte("new")), Port: 9090}
	if found := OS(template(), i, r); len(found) != 0 {
		t.Errorf("with the workload that is being replaced: %v", found)
	}
	i.Workload, i.Former = i.Former[0], nil
	i.Workload.SHA256 = digest.SHA256{} // a tar: by place
	if found := OS(template(), i, r); len(found) != 0 {
		t.Errorf("with unpacked workload: %v", found)
	}
	if Err(nil) != nil {
		t.Error("no findings are an error")
	}
}

type change struct {
	check  string
	change func(*audit.Report)
}

// atBothStages is refused whenever it is found.
var atBothStages = map[string]change{
	"other stage":          {"stage", func(r *audit.Report) { r.Stage = "x" }},
	"other nonce":          {"nonce", func(r *audit.Report) { r.Nonce = []byte("fedcba9876543210") }},
	"no nonce":             {"nonce", func(r *audit.Report) { r.Nonce = nil }},
	"other kernel":         {"kernel", func(r *audit.Report) { r.Kernel = "6.1.0-36-cloud-amd64" }},
	"kernel argument more": {"command line", func(r *audit.Report) { r.Cmdline += " init=/bin/sh" }},
	"tainted kernel":       {"kernel", func(r *audit.Report) { r.Tainted = 1 << 12 }},
	"other host name":      {"host name", func(r *audit.Report) { r.Hostname = "web-2" }},
	"swap":                 {"swap", func(r *audit.Report) { r.Swaps = []string{"/dev/vdb"} }},
	"module more":          {"module", func(r *audit.Report) { r.Modules = append(r.Modules, "rootkit") }},
	"process more": {"process", func(r *audit.Report) {
		r.Processes = append(r.Processes, audit.Process{PID: 7, Exe: "/bin/sh", SHA256: digest.Of([]byte("sh"))})
	}},
	"process w/o digest": {"process", func(r *audit.Report) {
		r.Processes = append(r.Processes, audit.Process{PID: 7, Exe: "/usr/lib/systemd/systemd"})
	}},
	"workload nobody asked": {"process", func(r *audit.Report) {
		r.Processes = append(r.Processes, audit.Process{PID: 7, UID: 61184, Exe: WorkloadDir + "/run", SHA256: workSum})
	}},
	"no agent": {"process", func(r *audit.Report) {
		r.Processes = slices.DeleteFunc(r.Processes, func(p audit.Process) bool { return p.SHA256 == agentSum })
	}},
	"altered agent": {"process", func(r *audit.Report) { p := &r.Processes[len(r.Processes)-1]; p.SHA256[0] ^= 1 }},
	"mount more": {"mount", func(r *audit.Report) {
		r.Mounts = append(r.Mounts, audit.Mount{Source: "tmpfs", Target: "/mnt", Type: "tmpfs"})
	}},
	"disk mounted for proc": {"mount", func(r *audit.Report) {
		r.Mounts = append(r.Mounts, audit.Mount{Source: "/dev/vdc", Target: "/proc", Type: "proc", Options: "nosuid"})
	}},
	"user more": {"user", func(r *audit.Report) {
		r.Users = append(r.Users, audit.User{Name: "eve", UID: 0, Shell: "/bin/sh", Locked: true})
	}},
	"file more": {"file", func(r *audit.Report) {
		r.Files = append(r.Files, audit.File{Path: "/etc/ld.so.preload", Mode: 0o100644})
	}},
	"no files": {"file", func(r *audit.Report) { r.Files = nil }},
	"disk more": {"disk", func(r *audit.Report) {
		r.Disks = append(r.Disks, audit.Disk{Name: "vdc", Number: "254:32", Size: 1 << 20})
	}},
	"loop device in use":     {"disk", func(r *audit.Report) { r.Disks[0].Size = 1 << 20 }},
	"template disk missing":  {"disk", func(r *audit.Report) { r.Disks = slices.Delete(r.Disks, 1, 2) }},
	"template disk writable": {"disk", func(r *audit.Report) { r.Disks[1].ReadOnly = false }},
	"template disk larger":   {"disk", func(r *audit.Report) { r.Disks[1].Size++ }},
	"volume smaller":         {"disk", func(r *audit.Report) { r.Disks[2].Size-- }},
	"volume read-only":       {"disk", func(r *audit.Report) { r.Disks[2].ReadOnly = true }},
	"mapping more": {"disk", func(r *audit.Report) {
		r.Disks = append(r.Disks, audit.Disk{Name: "dm-9", Number: "253:9", Mapped: "x", Table: "0 8 linear 254:16 0"})
	}},
	"tcp listener more": {"listener", func(r *audit.Report) {
		r.Listeners = append(r.Listeners, audit.Listener{Proto: "tcp", Port: 4444, Exe: "/init"})
	}},
	"ssh of another program": {"listener", func(r *audit.Report) {
		r.Listeners = append(r.Listeners, audit.Listener{Proto: "tcp", Port: 22, Exe: "/usr/sbin/sshd"})
	}},
	"raw socket":    {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, audit.Listener{Proto: "raw", Exe: "/init"}) }},
	"packet socket": {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, audit.Listener{Proto: "packet"}) }},
	"interface more": {"interface", func(r *audit.Report) {
		r.Interfaces = append(r.Interfaces, audit.Interface{Name: "eth1", MAC: "02:00:00:00:00:0b"})
	}},
	"address more":  {"interface", func(r *audit.Report) { r.Interfaces[0].Addresses = append(r.Interfaces[0].Addresses, "10.82.0.11/24") }},
	"IPv6 address":  {"interface", func(r *audit.Report) { r.Interfaces[0].Addresses = append(r.Interfaces[0].Addresses, "fe80::1/64") }},
	"other address": {"interface", func(r *audit.Report) { r.Interfaces[0].Addresses = []string{"10.82.0.11/24"} }},
	"no address":    {"interface", func(r *audit.Report) { r.Interfaces[0].Addresses = nil }},
	"other MAC":     {"interface", func(r *audit.Report) { r.Interfaces[0].MAC = "02:00:00:00:00:0b" }},
	"same MAC twice": {"interface", func(r *audit.Report) {
		r.Interfaces = append(r.Interfaces, audit.Interface{Name: "eth1", MAC: mac, Addresses: []string{"10.82.0.10/24"}})
	}},
	"address of loopback":    {"interface", func(r *audit.Report) { r.Interfaces[1].Addresses = append(r.Interfaces[1].Addresses, "10.0.0.1/32") }},
	"route to elsewhere":     {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "192.0.2.0/24 via 10.82.0.1 dev eth0") }},
	"route by a neighbour":   {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "10.81.0.20 via 10.82.0.200 dev eth0") }},
	"route in another table": {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "10.82.0.0/24 dev eth0 table 100") }},
	"route that drops":       {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "default dev eth0 type 6") }},
	"garbled route":          {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "x via y dev eth0") }},
	"empty route":            {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "") }},
}

func refuses(t *testing.T, what string, c change, good audit.Report, judge func(audit.Report) []Finding) {
	t.Helper()
	c.change(&good)
	found := judge(good)
	if !slices.ContainsFunc(found, func(f Finding) bool { return f.Check == c.check }) {
		t.Errorf("%s: want a finding of %q, got %v", what, c.check, found)
	}
	if err := Err(found); event.ReasonOf(err) != event.AuditFailed {
		t.Errorf("%s: %v", what, err)
	}
}

func TestOneThingTooMany(t *testing.T) {
	first := func(r audit.Report) []Finding { return Initramfs(template(), instance(), r) }
	second := func(r audit.Report) []Finding { return OS(template(), instance(), r) }
	for what, c := range atBothStages {
		refuses(t, "initramfs: "+what, c, initramfs(), first)
		refuses(t, "os: "+what, c, running(), second)
	}
	for what, c := range map[string]change{
		"altered file":          {"file", func(r *audit.Report) { r.Files[0].SHA256[0] ^= 1 }},
		"file with set-id":      {"file", func(r *audit.Report) { r.Files[0].Mode |= 0o4000 }},
		"disk opened too early": {"disk", func(r *audit.Report) { r.Disks = append(r.Disks, running().Disks[3]) }},
		"disk in use":           {"disk", func(r *audit.Report) { r.Disks[2].Mapped = "volume" }},
		"no SSH":                {"listener", func(r *audit.Report) { r.Listeners = nil }},
		"UDP":                   {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, audit.Listener{Proto: "udp", Port: 68}) }},
		"tunnel too early": {"interface", func(r *audit.Report) {
			r.Interfaces = append(r.Interfaces, audit.Interface{Name: "wg0", Addresses: []string{"10.84.0.7/32"}})
		}},
		"proc with set-id":  {"mount", func(r *audit.Report) { r.Mounts[1].Options = "rw" }},
		"program of the OS": {"process", func(r *audit.Report) { r.Processes = append(r.Processes, running().Processes[0]) }},
		"report of the OS":  {"stage", func(r *audit.Report) { *r = running() }},
	} {
		refuses(t, "initramfs: "+what, c, initramfs(), first)
	}
	table := func(at int, old, new string) func(*audit.Report) {
		return func(r *audit.Report) { r.Disks[at].Table = strings.Replace(r.Disks[at].Table, old, new, 1) }
	}
	for what, c := range map[string]change{
		"other program, good path": {"process", func(r *audit.Report) { r.Processes[0].SHA256 = digest.Of([]byte("sh")) }},
		"good program, other path": {"process", func(r *audit.Report) { r.Processes[0].Exe = "/var/systemd" }},
		"workload's place alone": {"process", func(r *audit.Report) {
			r.Processes = append(r.Processes, audit.Process{PID: 7, UID: 61184, Exe: WorkloadDir + "/x", SHA256: digest.Of([]byte("x"))})
		}},
		"user missing":            {"user", func(r *audit.Report) { r.Users = r.Users[1:] }},
		"user not locked":         {"user", func(r *audit.Report) { r.Users[0].Locked = false }},
		"user with a shell":       {"user", func(r *audit.Report) { r.Users[1].Shell = "/bin/bash" }},
		"user with another id":    {"user", func(r *audit.Report) { r.Users[0].UID = 0 }},
		"executable in /etc":      {"file", func(r *audit.Report) { r.Files[0].Mode = 0o100755 }},
		"device in /etc":          {"file", func(r *audit.Report) { r.Files[0].Mode = 0o020644 }},
		"link in place of a file": {"file", func(r *audit.Report) { r.Files[0].Mode = 0o120777 }},
		"link elsewhere":          {"file", func(r *audit.Report) { r.Files[1].SHA256[0] ^= 1 }},
		"root not erofs":          {"mount", func(r *audit.Report) { r.Mounts[0].Type = "ext4" }},
		"root writable":           {"mount", func(r *audit.Report) { r.Mounts[0].Options = "rw" }},
		"root not verified":       {"mount", func(r *audit.Report) { r.Mounts[0].Source = "/dev/mapper/template" }},
		"root mounted over": {"mount", func(r *audit.Report) {
			r.Mounts = append(r.Mounts, audit.Mount{Source: "tmpfs", Target: "/", Type: "tmpfs"})
		}},
		"no root":                   {"mount", func(r *audit.Report) { r.Mounts = r.Mounts[1:] }},
		"var elsewhere":             {"mount", func(r *audit.Report) { r.Mounts[3].Source = "/dev/vdb" }},
		"var with devices":          {"mount", func(r *audit.Report) { r.Mounts[3].Options = "rw,nosuid" }},
		"pattern over a folder":     {"mount", func(r *audit.Report) { r.Mounts[4].Target = "/run/credentials/a/b.service" }},
		"other root hash":           {"disk", table(4, rootHash.String(), digest.Of([]byte("x")).String())},
		"hash of another device":    {"disk", table(4, "253:0 253:0", "253:0 254:16")},
		"corruption ignored":        {"disk", func(r *audit.Report) { r.Disks[4].Table += " 1 ignore_corruption" }},
		"verity gone":               {"disk", func(r *audit.Report) { r.Disks[4].Table = "0 245760 linear 253:0 0" }},
		"verity writable":           {"disk", func(r *audit.Report) { r.Disks[4].ReadOnly = false }},
		"verity of two parts":       {"disk", func(r *audit.Report) { r.Disks[4].Table += "\n245760 8 linear 254:16 0" }},
		"template not encrypted":    {"disk", func(r *audit.Report) { r.Disks[3].Table = "0 262144 linear 254:0 0" }},
		"template other cipher":     {"disk", table(3, "aes-xts-plain64", "null-ecb")},
		"template other offset":     {"disk", table(3, "254:0 0", "254:0 8")},
		"volume not encrypted":      {"disk", func(r *audit.Report) { r.Disks[5].Table = "0 2097152 linear 254:16 0" }},
		"volume over the template":  {"disk", table(5, "254:16", "254:0")},
		"volume other cipher":       {"disk", table(5, "aes-xts-plain64", "null-ecb")},
		"volume other sectors":      {"disk", table(5, "4096", "512")},
		"volume key in the report":  {"disk", table(5, " - ", " 00112233 ")},
		"volume gone":               {"disk", func(r *audit.Report) { r.Disks = r.Disks[:5] }},
		"disk without number":       {"disk", func(r *audit.Report) { r.Disks[1].Number = "" }},
		"SSH still open":            {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, initramfs().Listeners...) }},
		"workload's port too soon":  {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, audit.Listener{Proto: "tcp", Port: 8080}) }},
		"second UDP port":           {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, audit.Listener{Proto: "udp", Port: 53}) }},
		"UDP of a program":          {"listener", func(r *audit.Report) { r.Listeners[0].Exe = "/usr/lib/systemd/systemd" }},
		"no tunnel":                 {"interface", func(r *audit.Report) { r.Interfaces = r.Interfaces[:2] }},
		"other tunnel address":      {"interface", func(r *audit.Report) { r.Interfaces[2].Addresses = []string{"10.84.0.8/32"} }},
		"default beside the tunnel": {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "default via 10.82.0.1 dev eth0") }},
		"no default":                {"route", func(r *audit.Report) { r.Routes = r.Routes[:2] }},
		"route to the boot server":  {"route", func(r *audit.Report) { r.Routes = append(r.Routes, "10.81.0.10 via 10.82.0.1 dev eth0") }},
		"report of the initramfs":   {"stage", func(r *audit.Report) { *r = initramfs() }},
	} {
		refuses(t, "os: "+what, c, running(), second)
	}
}

func ramDisk() audit.Disk { return audit.Disk{Name: "ram0", Number: "1:0", Size: 4096} }

// authenticated is the report of a VM whose volume keeps tags.
func authenticated() audit.Report {
	r := running()
	r.Disks[5] = audit.Disk{Name: "dm-2", Number: "253:2", Mapped: "tags", Size: 1000 << 20,
		Table: "0 2048000 integrity 253:4 0 32 J 7 block_size:4096 journal_sectors:16896 interleave_sectors:32768 buffer_sectors:128 journal_watermark:50 commit_time:10000 fix_padding"}
	r.Disks = append(r.Disks, audit.Disk{Name: "dm-3", Number: "253:3", Mapped: "volume", Size: 1000 << 20,
		Table: "0 2048000 crypt capi:authenc(hmac(sha256),xts(aes))-plain64 - 0 253:2 0 2 integrity:32:aead sector_size:4096"},
		audit.Disk{Name: "dm-4", Number: "253:4", Mapped: "tags-disk", Size: 1 << 30, Table: "0 8 linear 1:0 0\n8 2097144 linear 254:16 8"},
		ramDisk())
	return r
}

func TestAuthenticatedVolume(t *testing.T) {
	tpl := template()
	tpl.AuthenticatedVolume = true
	judge := func(r audit.Report) []Finding { return OS(tpl, instance(), r) }
	if found := judge(authenticated()); len(found) != 0 {
		t.Errorf("as it should be: %v", found)
	}
	table := func(at int, old, new string) change {
		return change{"disk", func(r *audit.Report) { r.Disks[at].Table = strings.Replace(r.Disks[at].Table, old, new, 1) }}
	}
	for what, c := range map[string]change{
		"no tags": {"disk", func(r *audit.Report) { *r = running() }},
		"tags not checked": {"disk", func(r *audit.Report) {
			r.Disks[6].Table = "0 2048000 crypt aes-xts-plain64 - 0 253:2 0 1 sector_size:4096"
		}},
		"crypt beside the tags":               table(6, "253:2", "254:16"),
		"superblock on the disk":              table(5, "253:4", "254:16"),
		"superblock on the disk, by a detour": {"disk", func(r *audit.Report) { r.Disks[7].Table = "0 2097152 linear 254:16 0" }},
		"first block of the disk":             table(7, "linear 1:0 0", "linear 254:16 0"),
		"half a block in memory":              {"disk", func(r *audit.Report) { r.Disks[7].Table = "0 4 linear 1:0 0\n4 2097148 linear 254:16 4" }},
		"shifted disk":                        table(7, "254:16 8", "254:16 0"),
		"another disk":                        table(7, "254:16 8", "254:0 8"),
		"less of the disk":                    table(7, "2097144", "2097136"),
		"a third target":                      {"disk", func(r *audit.Report) { r.Disks[7].Table += "\n2097152 8 linear 254:16 0" }},
		"other place in memory":               table(7, "1:0 0", "1:0 8"),
		"other target in memory":              table(7, "0 8 linear", "0 8 striped"),
		"assembled twice":                     {"disk", func(r *audit.Report) { d := r.Disks[7]; d.Name = "dm-5"; r.Disks = append(r.Disks, d) }},
		"assembled read-only":                 {"disk", func(r *audit.Report) { r.Disks[7].ReadOnly = true }},
		"assembled larger":                    {"disk", func(r *audit.Report) { r.Disks[7].Size++ }},
		"no RAM disk":                         {"disk", func(r *audit.Report) { r.Disks = slices.Delete(r.Disks, 8, 9) }},
		"a disk called RAM disk":              {"disk", func(r *audit.Report) { r.Disks[8].Number = "254:32" }},
		"a larger RAM disk":                   {"disk", func(r *audit.Report) { r.Disks[8].Size = 16 << 20 }},
		"a second RAM disk": {"disk", func(r *audit.Report) {
			d := r.Disks[8]
			d.Name = "ram1"
			d.Number = "1:1"
			r.Disks = append(r.Disks, d)
		}},
		"a mapped RAM disk":      {"disk", func(r *audit.Report) { r.Disks[8].Table = "0 8 linear 254:16 0" }},
		"integrity not asked of": table(6, "2 integrity:32:aead", "1"),
		"shorter tags above":     table(6, "integrity:32", "integrity:16"),
		"shorter tags":           table(5, " 32 J", " 4 J"),
		"no journal":             table(5, " 32 J", " 32 D"),
		"recovery":               table(5, " 32 J", " 32 R"),
		"tags made below":        table(5, "fix_padding", "fix_padding internal_hash:crc32c"),
		"tags elsewhere":         table(5, "fix_padding", "fix_padding meta_device:254:32"),
		"tags made anew":         table(5, "fix_padding", "fix_padding recalculate"),
		"tags over the template": table(5, "253:4", "254:0"),
		"other blocks":           table(5, "block_size:4096", "block_size:512"),
		"other start":            table(5, "253:4 0", "253:4 8"),
		"other journal":          table(5, "journal_sectors:16896", "journal_sectors:264"),
		"an option of two words": table(5, "commit_time:10000", "commit_time:meta_device:254:32"),
		"an option not counted":  table(5, "J 7", "J recalculate"),
		"a small volume":         {"disk", func(r *audit.Report) { r.Disks[5].Size = 1 << 20; r.Disks[5].Table = "0 2048" + r.Disks[5].Table[9:] }},
		"part of the tags": {"disk", func(r *audit.Report) {
			r.Disks[6].Size = 500 << 20
			r.Disks[6].Table = "0 1024000" + r.Disks[6].Table[9:]
		}},
		"shorter table":        table(6, "0 2048000", "0 1024000"),
		"read-only volume":     {"disk", func(r *audit.Report) { r.Disks[6].ReadOnly = true }},
		"discards":             table(6, "2 integrity:32:aead", "3 allow_discards integrity:32:aead"),
		"tags gone":            {"disk", func(r *audit.Report) { r.Disks = slices.Delete(r.Disks, 5, 6) }},
		"mounted without tags": {"mount", func(r *audit.Report) { r.Mounts[3].Source = "/dev/mapper/tags" }},
	} {
		refuses(t, what, c, authenticated(), judge)
	}
	// Before the disks are opened the RAM disk is there, and nothing else.
	closed := func(r audit.Report) []Finding { return Initramfs(tpl, instance(), r) }
	before := initramfs()
	if found := closed(before); len(found) != 1 {
		t.Errorf("no RAM disk before: %v", found)
	}
	before.Disks = append(before.Disks, ramDisk())
	if found := closed(before); len(found) != 0 {
		t.Errorf("before, as it should be: %v", found)
	}
	if found := Initramfs(template(), instance(), before); len(found) == 0 {
		t.Error("a RAM disk is accepted where no volume needs one")
	}
	// A volume with tags where the template asks for none was not made by our order.
	if found := OS(template(), instance(), authenticated()); len(found) == 0 {
		t.Error("tags are accepted where none are asked for")
	}
}

func TestWorkload(t *testing.T) {
	i := instance()
	i.Workload = &Workload{SHA256: workSum, Port: 8080}
	good := audit.Process{PID: 200, UID: 61184, Exe: "/run/foothold/workload/run", SHA256: workSum}
	for what, c := range map[string]change{
		"as root":         {"process", func(r *audit.Report) { p := good; p.UID = 0; r.Processes = append(r.Processes, p) }},
		"altered":         {"process", func(r *audit.Report) { p := good; p.SHA256[0] ^= 1; r.Processes = append(r.Processes, p) }},
		"on another port": {"listener", func(r *audit.Report) { r.Listeners = append(r.Listeners, audit.Listener{Proto: "tcp", Port: 8081}) }},
		"on UDP of its own": {"listener", func(r *audit.Report) {
			r.Listeners = append(r.Listeners, audit.Listener{Proto: "udp", Port: 8080, Exe: good.Exe})
		}},
	} {
		refuses(t, what, c, running(), func(r audit.Report) []Finding { return OS(template(), i, r) })
	}
}

func TestFindingsAreBounded(t *testing.T) {
	r := initramfs()
	for range 1000 {
		r.Modules = append(r.Modules, "rootkit")
	}
	if found := Initramfs(template(), instance(), r); len(found) == 0 || len(found) > maxFindings {
		t.Errorf("%d findings", len(found))
	}
}

func TestTemplate(t *testing.T) {
	data, err := template().Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if back, _ := json.Marshal(again); string(back) != string(data) {
		t.Error("it changed on the way")
	}
	for what, change := range map[string]func(*Template){
		"no kernel":          func(t *Template) { t.Kernel = "" },
		"no agent":           func(t *Template) { t.Agent = digest.SHA256{} },
		"program w/o digest": func(t *Template) { t.OS.Programs[0].SHA256 = digest.SHA256{} },
		"relative program":   func(t *Template) { t.OS.Programs[0].Path = "systemd" },
		"mount of any type":  func(t *Template) { t.OS.Mounts[0].Type = "" },
		"mount of no source": func(t *Template) { t.OS.Mounts[0].Source = "" },
		"bad pattern":        func(t *Template) { t.OS.Mounts[0].Target = "/[" },
		"bad file pattern":   func(t *Template) { t.OS.Files[0].Path = "/[" },
		"relative file":      func(t *Template) { t.Initramfs.Files[0].Path = "init" },
		"nameless user":      func(t *Template) { t.OS.Users[0].Name = "" },
	} {
		bad := template()
		change(&bad)
		if bad.Validate() == nil {
			t.Errorf("%s: accepted", what)
		}
		if _, err := bad.Encode(); err == nil {
			t.Errorf("%s: encoded", what)
		}
	}
	for what, text := range map[string]string{
		"empty": "", "unknown field": strings.Replace(string(data), `"kernel"`, `"kernels"`, 1), "trailing": string(data) + "{}", "huge": strings.Repeat(" ", MaxTemplate+1),
	} {
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if found := Initramfs(Template{}, Instance{}, audit.Report{}); len(found) == 0 {
		t.Error("nothing expected and nothing reported passes")
	}
	if found := OS(Template{}, Instance{}, audit.Report{Stage: audit.OS}); len(found) == 0 {
		t.Error("nothing expected and nothing reported passes")
	}
}

func FuzzParse(f *testing.F) {
	data, err := template().Encode()
	if err != nil {
		f.Fatal(err)
	}
	report, _ := json.Marshal(running())
	f.Add(data, report)
	f.Fuzz(func(t *testing.T, data, report []byte) {
		tpl, err := Parse(data)
		if err != nil {
			return
		}
		var r audit.Report
		if json.Unmarshal(report, &r) != nil {
			return
		}
		OS(tpl, instance(), r)
		Initramfs(tpl, instance(), r)
	})
}

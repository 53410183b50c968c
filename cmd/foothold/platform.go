package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"foothold/client/term"
	"foothold/internal/durable"
	"foothold/internal/signingkey"
	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/tenant/reference"

	"github.com/spf13/cobra"
)

// maxDocument bounds a manifest or an evidence file in bytes.
const maxDocument = 64 << 20

func platformCommand() *cobra.Command {
	return contextFlag(group("platform", "Make, try, compare and take into use reference values of the provider's platform",
		`Reference values say what one release of the provider's platform measures while it boots,
and which files it runs. A host that measured anything else gets none of your VMs. You make
them from a known-good host, examine them, sign them off line, and import them.`,
		platformDiff(), platformEvidence(),
		group("manifest", "Make, try, sign, show, compare, import and withdraw reference values",
			`A manifest is a JSON document for people and programs. It counts once it is signed and
imported, from its beginning to its end. Several may count for one release: a host has to
satisfy all of any one.`,
			manifestCreate(), manifestTry(), manifestSign(), manifestShow(), manifestDiff(), manifestImport(), manifestList(), manifestWithdraw())))
}

type manifestFlags struct {
	name, profile, bios, kernel, initramfs, cmdline, out string
	evidence                                             []string
	from, phases                                         string
	uki, line                                            string
	menus, roots, skip                                   []string
	valid                                                time.Duration
}

func manifestCreate() *cobra.Command {
	var f manifestFlags
	c := &cobra.Command{
		Use:   "create --name RELEASE --evidence FILE [--uki FILE --root DIR[:PATH]] --bios FILE --loader-kernel FILE --loader-initramfs FILE",
		Short: "Make reference values from what known-good hosts measured, or from a release's files",
		Long: `Make reference values from what known-good hosts measured, or from a release's files, and
from the files that the release's VMs start with. An evidence file is a JSON object with "firmware" and "kernel",
base64 of a host's /sys/kernel/security/tpm0/binary_bios_measurements and
/sys/kernel/security/ima/binary_runtime_measurements, and "userspace", of its
/run/log/systemd/tpm2-measure.log where systemd keeps one (from 254); 'foothold platform
evidence' fetches it.
Reference values are of the SHA-256 bank, which quotes are of; a log without it is refused.

With several hosts of one release, what differs between them becomes alternatives, and
what only some have may be missing on others. Read the result before you sign it: what
stands in it is what you trust.

The phases of the boot that systemd measures are in the log of evidence where systemd keeps
one (from version 254); name them by --phases where it keeps none. Without either, register
11 must be as firmware and boot loader leave it. A host may have come to any point of them.

With --uki and --root no host needs to have booted the release: what one measures that does
is computed from the unified kernel image and from the files of its root. What only firmware
knows - its code, its settings, secure boot, how it leaves the boot services - is then all
that is taken of the evidence, whose hosts may run another release on the same hardware:
registers 0 to 3 and 5 to 7, and of 4 what is no program. The image's stub must be
systemd-stub 252 to 254 (252 is what was tried), without signed PCR policies: other stubs
hand over an initramfs of their own making, and a host has to show what that measures.
Every regular file of a root is named under the path at which a host mounts it. Leave out by
--skip what no host runs or reads: a signed manifest has room for some 15,000 files.`,
		Example: `  foothold platform manifest create --name 2026-11 --evidence host-1.json --evidence host-2.json \
    --bios qboot.rom --loader-kernel vmlinuz --loader-initramfs loader.cpio --out 2026-11.json
  foothold platform manifest create --name 2026-12 --evidence host-1.json --uki linux.efi --root unpacked:/ \
    --skip /usr/share --phases enter-initrd:leave-initrd:sysinit:ready \
    --bios qboot.rom --loader-kernel vmlinuz --loader-initramfs loader.cpio --out 2026-12.json
  foothold platform manifest show 2026-11.json
  foothold platform manifest sign 2026-11.json --key platform.key --out platform.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			doc, err := f.manifest(time.Now())
			if err != nil {
				return err
			}
			return writeDocument(cmd.OutOrStdout(), f.out, doc)
		},
	}
	c.Flags().StringVar(&f.name, "name", "", "`RELEASE`, as the inventory names it at each host")
	c.Flags().StringVar(&f.profile, "profile", platform.Production, "`PROFILE` of the installations that may accept it")
	c.Flags().StringArrayVar(&f.evidence, "evidence", nil, "`FILE` of what a known-good host measured; may be repeated")
	c.Flags().StringVar(&f.uki, "uki", "", "`FILE` of the unified kernel image that hosts boot")
	c.Flags().StringArrayVar(&f.menus, "boot-menu", nil, "`FILE` of a program that the firmware starts before the image (systemd-boot); may be repeated")
	c.Flags().StringVar(&f.line, "kernel-cmdline", "", "the kernel's command line, where a boot menu passes one in place of the image's")
	c.Flags().StringArrayVar(&f.roots, "root", nil, "`DIR[:PATH]` with files of the release, and where hosts mount it [/]; may be repeated")
	c.Flags().StringArrayVar(&f.skip, "skip", nil, "`PATH` on the hosts below which nothing is named; may be repeated")
	c.Flags().StringVar(&f.phases, "phases", "", "`WORDS` that the hosts' systemd measures while it starts: enter-initrd:leave-initrd:sysinit:ready")
	c.Flags().StringVar(&f.bios, "bios", "", "`FILE` of VMs' firmware")
	c.Flags().StringVar(&f.kernel, "loader-kernel", "", "`FILE` of the loader's kernel")
	c.Flags().StringVar(&f.initramfs, "loader-initramfs", "", "`FILE` of the loader's initramfs")
	c.Flags().StringVar(&f.cmdline, "loader-cmdline", "", "the loader kernel's command line")
	c.Flags().StringVar(&f.from, "valid-from", "", "`TIME` in RFC 3339 from which it counts (default: now)")
	c.Flags().DurationVar(&f.valid, "valid-for", 90*24*time.Hour, "how long it counts")
	c.Flags().StringVar(&f.out, "out", "", "`FILE` for the manifest (default: standard output)")
	return c
}

func (f manifestFlags) manifest(now time.Time) (platform.Manifest, error) {
	doc := platform.Manifest{Name: f.name, Profile: f.profile, ValidFrom: now.UTC().Truncate(time.Second)}
	if f.name == "" || len(f.evidence) == 0 || f.valid <= 0 {
		return doc, usage("want --name, --evidence and a positive --valid-for")
	}
	if f.profile != platform.Production {
		return doc, usage("profile %q: only production hosts measure firmware and kernel; a lab signs its own release at its start", f.profile)
	}
	if f.from != "" {
		at, err := time.Parse(time.RFC3339, f.from)
		if err != nil {
			return doc, usage("--valid-from %q: want a time like 2026-11-25T12:00:00Z", f.from)
		}
		doc.ValidFrom = at.UTC()
	}
	doc.ValidUntil = doc.ValidFrom.Add(f.valid)
	doc.Firmware.LoaderCmdline = f.cmdline
	for _, part := range []struct {
		flag, file string
		sum        *digest.SHA256
	}{{"bios", f.bios, &doc.Firmware.BIOS}, {"loader-kernel", f.kernel, &doc.Firmware.LoaderKernel}, {"loader-initramfs", f.initramfs, &doc.Firmware.LoaderInitramfs}} {
		if part.file == "" {
			return doc, usage("want --%s", part.flag)
		}
		data, err := readDocument(part.file)
		if err != nil {
			return doc, err
		}
		*part.sum = digest.Of(data)
	}
	release, err := f.release()
	if err != nil {
		return doc, err
	}
	for _, file := range f.evidence {
		data, err := readDocument(file)
		if err != nil {
			return doc, err
		}
		var host evidence.Platform
		if err := strictjson.Unmarshal(data, &host); err != nil {
			return doc, fmt.Errorf("evidence %s: %w", file, err)
		}
		if release == nil {
			err = reference.Add(&doc, host)
		} else {
			err = release.Add(&doc, host.Firmware)
		}
		if err != nil {
			return doc, fmt.Errorf("evidence %s: %w", file, err)
		}
	}
	return doc, f.addPhases(&doc)
}

// release reads the release's files; nil if reference values are made without them.
func (f manifestFlags) release() (r *reference.Release, err error) {
	if f.uki == "" && len(f.roots) == 0 {
		if len(f.menus)+len(f.skip) > 0 || f.line != "" {
			return nil, usage("--boot-menu, --kernel-cmdline and --skip go with --uki and --root")
		}
		return nil, nil
	}
	if f.uki == "" || len(f.roots) == 0 {
		return nil, usage("want --uki and --root together: a host boots the one and runs the other")
	}
	r = &reference.Release{Cmdline: f.line}
	if r.UKI, err = readImage(f.uki); err != nil {
		return nil, err
	}
	for _, file := range f.menus {
		menu, err := readImage(file)
		if err != nil {
			return nil, err
		}
		r.Loaders = append(r.Loaders, menu)
	}
	for _, root := range f.roots {
		dir, mount, ok := strings.Cut(root, ":")
		if !ok {
			mount = "/"
		}
		if !path.IsAbs(mount) {
			return nil, usage("--root %q: want DIR:PATH, with the whole path at which hosts mount it", root)
		}
		files, err := reference.Files(dir, mount, f.skip)
		if err != nil {
			return nil, err
		}
		r.Files = append(r.Files, files...)
	}
	return r, nil
}

// maxImage bounds a program of EFI's in bytes: an image with an initramfs of drivers and
// firmware.
const maxImage = 1 << 30

func readImage(file string) ([]byte, error) { return readLimited(file, maxImage) }

// addPhases adds the words of --phases, which what the evidence shows must be a beginning of.
func (f manifestFlags) addPhases(doc *platform.Manifest) (err error) {
	if f.phases == "" {
		return nil
	}
	var texts []platform.Text
	for word := range strings.SplitSeq(f.phases, ":") {
		if word == "" {
			return usage("--phases %q: want words with a colon between two, as systemd-measure has them", f.phases)
		}
		texts = append(texts, platform.Text{PCR: platform.PhaseRegister, Text: word})
	}
	if doc.Userspace, err = reference.AddTexts(doc.Userspace, texts); err != nil {
		return fmt.Errorf("--phases: %w", err)
	}
	return nil
}

func manifestSign() *cobra.Command {
	var key, out string
	c := &cobra.Command{
		Use:   "sign FILE --key FILE",
		Short: "Sign reference values that you have examined",
		Long: `Sign reference values with the organisation's platform key, which stays off line. What an
orchestrator would refuse - nothing named, an event or a file without digest, a register
without its separator - is not signed.`,
		Example: `  foothold platform manifest sign 2026-11.json --key platform.key --out platform.json`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" {
				return usage("want --key FILE: the platform key, Ed25519 as PKCS #8 in PEM, readable by its owner alone")
			}
			payload, err := readDocument(args[0])
			if err != nil {
				return err
			}
			private, err := signingkey.Read(key)
			if err != nil {
				return err
			}
			env, err := reference.Sign(private, payload)
			if err != nil {
				return fmt.Errorf("sign %s: %w", args[0], err)
			}
			return writeDocument(cmd.OutOrStdout(), out, env)
		},
	}
	c.Flags().StringVar(&key, "key", "", "`FILE` of the platform key")
	c.Flags().StringVar(&out, "out", "", "`FILE` for the signed manifest (default: standard output)")
	return c
}

func manifestShow() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use:     "show FILE",
		Short:   "Show reference values, signed or not",
		Long:    `Show reference values. A signature is named and not checked: the orchestrator checks it.`,
		Example: `  foothold platform manifest show platform.json`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			doc, sum, err := readManifest(args[0])
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			showManifest(term.New(cmd.OutOrStdout()), doc, sum)
			return nil
		},
	})
}

func showManifest(out *term.Out, doc platform.Manifest, sum digest.SHA256) {
	out.Line("release %s, profile %s", term.Clean(doc.Name), term.Clean(doc.Profile))
	out.Line("counts from %s to %s", doc.ValidFrom.UTC().Format(time.RFC3339), doc.ValidUntil.UTC().Format(time.RFC3339))
	out.Line("sha256 of the document: %s", sum)
	var rows [][]string
	for _, e := range doc.Boot {
		note := ""
		if e.Optional {
			note = "may be missing"
		}
		rows = append(rows, []string{fmt.Sprintf("PCR %d", e.PCR), term.Clean(e.Component), sums(e.SHA256), note})
	}
	for _, t := range doc.Userspace {
		rows = append(rows, []string{fmt.Sprintf("PCR %d", t.PCR), term.Clean(t.Component()), t.Digest().String(), "may not be there yet"})
	}
	for _, f := range doc.Files {
		rows = append(rows, []string{"PCR 10", term.Clean(f.Name), sums([]digest.SHA256{f.SHA256}), ""})
	}
	for _, p := range []struct {
		name string
		sum  digest.SHA256
	}{{"firmware", doc.Firmware.BIOS}, {"loader kernel", doc.Firmware.LoaderKernel}, {"loader initramfs", doc.Firmware.LoaderInitramfs}} {
		rows = append(rows, []string{"VMs", p.name, sums([]digest.SHA256{p.sum}), ""})
	}
	out.Table([]string{"measured", "component", "sha256", ""}, rows)
}

func manifestDiff() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say in component names what two sets of reference values differ in",
		Long: `Say in component names what NEW changes in OLD. The exit code is 1 if they differ, so that
a script can tell.`,
		Example: `  foothold platform manifest diff 2026-10.json 2026-11.json`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			before, _, err := readManifest(args[0])
			if err != nil {
				return err
			}
			after, _, err := readManifest(args[1])
			if err != nil {
				return err
			}
			changes := orEmpty(reference.Diff(before, after))
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), changes)
			} else {
				showChanges(term.New(cmd.OutOrStdout()), changes)
			}
			if err == nil && len(changes) > 0 {
				err = fmt.Errorf("%s", plural(len(changes), "component differs", "components differ"))
			}
			return err
		},
	})
}

func showChanges(out *term.Out, changes []reference.Change) {
	for _, c := range changes {
		verb := "changed"
		switch {
		case len(c.Before) == 0 && len(c.After) > 0:
			verb = "new"
		case len(c.After) == 0 && len(c.Before) > 0:
			verb = "gone"
		}
		out.Line("%-8s %s", verb, term.Clean(c.Component))
		if len(c.Before) > 0 {
			out.Line("           was  %s", sums(c.Before))
		}
		if len(c.After) > 0 {
			out.Line("           is   %s", sums(c.After))
		}
		if c.Note != "" {
			out.Line("           %s", term.Clean(c.Note))
		}
	}
	if len(changes) == 0 {
		out.Line("no component differs")
	}
}

// sums are digests in one cell.
func sums(list []digest.SHA256) string {
	text := ""
	for i, s := range list {
		if i > 0 {
			text += " or "
		}
		text += s.String()
	}
	return text
}

// readManifest reads a manifest, in its envelope or without one, and its digest.
func readManifest(file string) (doc platform.Manifest, sum digest.SHA256, err error) {
	data, err := readDocument(file)
	if err != nil {
		return doc, sum, err
	}
	var env signed.Envelope
	if strictjson.Unmarshal(data, &env) == nil && len(env.Payload) > 0 {
		data = env.Payload
	}
	if err := strictjson.Unmarshal(data, &doc); err != nil {
		return doc, sum, fmt.Errorf("manifest %s: %w", file, err)
	}
	return doc, digest.Of(data), nil
}

func readDocument(file string) ([]byte, error) { return readLimited(file, maxDocument) }

func readLimited(file string, most int) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err == nil && len(data) > most {
		err = fmt.Errorf("%s: it has more than %d bytes", file, most)
	}
	return data, err
}

// writeDocument writes a value as JSON, to a file or to standard output.
func writeDocument(stdout io.Writer, file string, v any) error {
	if file == "" {
		return printJSON(stdout, v)
	}
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(file, append(data, '\n'), 0o644)
}

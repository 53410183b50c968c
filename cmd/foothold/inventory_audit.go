package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"foothold/client/term"
	"foothold/internal/bootimage"
	"foothold/protocol/api"
	"foothold/protocol/hostaudit"

	"github.com/spf13/cobra"
)

// maxConsole bounds a console's recording in bytes.
const maxConsole = 16 << 20

func inventoryAudit() *cobra.Command {
	return group("audit", "Ask a physical host's TPM directly, from trusted media",
		`An inventory is the provider's word. An audit shows that the machine which stands in the
provider's rack has the TPM, and the keys in it, that the inventory names for that host:

  1. foothold inventory audit prepare HOST --out DIR    makes a medium for one audit
  2. boot the host from it; its serial console prints a signed report, and it powers off
  3. foothold inventory audit check HOST CONSOLE.txt    holds the report against the inventory

The medium asks the TPM without the provider's software between. It has no network and
mounts no disk. Whoever can read it can sign a report, so keep it in trusted hands, and
destroy it afterwards; an order serves once, for a week. A host whose audit failed gets no
VM until a later one is good, whatever it quotes.`,
		auditPrepare(), auditCheck(), auditList())
}

func auditPrepare() *cobra.Command {
	var out, cache, program string
	c := &cobra.Command{
		Use:   "prepare HOST --out DIR",
		Short: "Make the medium for one audit of a host",
		Long: `Make the medium for one audit of a host. DIR gets ` + bootimage.AuditFile + `, a program of EFI's to be
booted by whatever way you trust - a USB stick (as EFI/BOOT/BOOTX64.EFI on a FAT file
system), a virtual medium of the host's management controller, HTTP boot - and the same
as ` + bootimage.KernelFile + ` and ` + bootimage.InitramfsFile + `. The host must be down: it cannot run VMs meanwhile, and its
registers change. With secure boot on, sign the program with a key that the host knows.`,
		Example: `  foothold inventory audit prepare host-1 --out audit-host-1
  ls audit-host-1                     # ` + bootimage.AuditFile + `  ` + bootimage.InitramfsFile + `  ` + bootimage.KernelFile,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			if out == "" {
				return usage("want --out DIR, a folder for the medium")
			}
			if err := auditPaths(cmd, &cache, &program); err != nil {
				return err
			}
			public, private, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				return fmt.Errorf("make the medium's key: %w", err)
			}
			kernel, err := bootimage.FetchKernel(cmd.Context(), cache, func(text string) { s.log.Line("%s", text) })
			if err != nil {
				return err
			}
			order, err := s.OrderHostAudit(cmd.Context(), args[0], public)
			if err != nil {
				return err
			}
			medium, err := json.Marshal(hostaudit.Medium{Order: order, Seed: private.Seed()})
			if err != nil {
				return fmt.Errorf("make medium: %w", err)
			}
			if err := os.MkdirAll(out, 0o700); err != nil {
				return fmt.Errorf("make medium: %w", err)
			}
			if _, err := bootimage.BuildAudit(cmd.Context(), kernel, program, hostaudit.MediumFile, medium, cache, out, func(text string) { s.log.Line("%s", text) }); err != nil {
				return err
			}
			s.log.Line("audit %s of host %s: boot %s there by %s, record its serial console, then:\n  foothold inventory audit check %s CONSOLE.txt",
				order.Number, args[0], filepath.Join(out, bootimage.AuditFile), order.Expires.Format("2006-01-02 15:04 MST"), args[0])
			return nil
		}),
	}
	c.Flags().StringVar(&out, "out", "", "`DIR` for the medium; its files are your user's alone")
	c.Flags().StringVar(&cache, "cache", "", "`FOLDER` of packages (default: the context's, else ~/.cache/foothold/build)")
	c.Flags().StringVar(&program, "program", "", "foothold-audit `FILE` (default: beside this program)")
	return c
}

// defaultCache is where packages are kept that no context names a place for.
func defaultCache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", usage("%w", err)
	}
	return filepath.Join(dir, "foothold", "build"), nil
}

// auditPaths fills what no flag said.
func auditPaths(cmd *cobra.Command, cache, program *string) error {
	c, err := findContext(cmd)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	if *cache == "" {
		*cache = c.Cache
	}
	if *cache == "" {
		if *cache, err = defaultCache(); err != nil {
			return err
		}
	}
	if *program == "" {
		*program = filepath.Join(filepath.Dir(self), "foothold-audit")
	}
	return nil
}

func auditCheck() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use:   "check HOST FILE",
		Short: "Hold an audit's report against the inventory",
		Long: `Hold an audit's report against the inventory. FILE is what the host's serial console
printed, - for standard input; what stands around the report is passed over. The exit
code is 1 if a check failed. An order takes one report.`,
		Example: `  foothold inventory audit check host-1 console.txt`,
		Args:    cobra.ExactArgs(2),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			in := cmd.InOrStdin()
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return usage("%w", err)
				}
				defer f.Close()
				in = f
			}
			text, err := io.ReadAll(io.LimitReader(in, maxConsole))
			if err != nil {
				return fmt.Errorf("read %s: %w", args[1], err)
			}
			env, err := hostaudit.Read(text)
			if err != nil {
				return usage("%s: %w", args[1], err)
			}
			a, err := s.JudgeHostAudit(cmd.Context(), args[0], env)
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), a)
			} else {
				showAudit(s.out, a)
				showAlerts(s.log, a.Alerts)
			}
			switch {
			case err != nil:
			case !a.Good:
				err = errors.New("the audit of host " + a.Host + " failed: it gets no VM until one that is ordered later is good; " +
					"`foothold vm list` shows what runs there")
			case a.Outdone != "":
				err = errors.New("the audit is good, and host " + a.Host + " still gets no VM, for one that was ordered later failed: " + term.Clean(a.Outdone) + "; order another")
			}
			return err
		}),
	})
}

func showAudit(out *term.Out, a api.HostAudit) {
	verdict := out.Paint(term.Good, "the TPM and its keys are those of the inventory")
	if !a.Good {
		verdict = out.Paint(term.Bad, "failed")
	}
	out.Line("audit %s of host %s: %s", a.Number, term.Clean(a.Host), verdict)
	for _, c := range a.Checks {
		out.Line("  %-13s %s", c.Check, term.Clean(c.Detail))
		if c.Do != "" {
			out.Line("  %-13s %s", "", term.Clean(c.Do))
		}
	}
	out.Line("its firmware says asset tag %q, serial number %q; the inventory says asset tag %q: compare them by eye, nothing proves them",
		term.Clean(a.Asset), term.Clean(a.Serial), term.Clean(a.Inventory))
}

func auditList() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "list HOST", Aliases: []string{"ls"}, Short: "List a host's audits, newest first",
		Example: "  foothold inventory audit list host-1",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			list, err := s.HostAudits(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), orEmpty(list))
			}
			var rows [][]string
			for _, a := range list {
				state, tone := "waits for its report", term.Plain
				switch {
				case a.Good:
					state, tone = "good", term.Good
				case !a.Judged.IsZero():
					state, tone = plural(len(a.Checks), "check failed", "checks failed"), term.Bad
				}
				rows = append(rows, []string{a.Number, s.out.Paint(tone, state), when(a.Judged), when(a.Expires)})
			}
			s.out.Table([]string{"audit", "result", "judged", "order expires"}, rows)
			return nil
		}),
	})
}

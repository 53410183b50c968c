package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"foothold/client"
	"foothold/internal/bootimage"
	"foothold/lab/ground"
	"foothold/lab/hostimage"
	"foothold/lab/supervisor"

	"github.com/spf13/cobra"
)

// labAudit boots a host audit's medium on the lab's one physical host.
func labAudit(open openLab) *cobra.Command {
	cache := ""
	cmd := &cobra.Command{
		Use:   "audit DIR",
		Short: "Boot a host audit's medium on the lab's host, which must be down",
		Long: `Boot a host audit's medium, which ` + "`foothold inventory audit prepare`" + ` made, on the lab's
host: a machine under UEFI firmware that has the host's TPM. The lab must be down, since a
host that runs an audit runs nothing else. What the serial console prints goes to standard
output.`,
		Example: `  foothold inventory audit prepare host-1 --out medium
  foothold lab down
  foothold lab audit medium > console.txt
  foothold lab up
  foothold inventory audit check host-1 console.txt`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			lock, err := supervisor.Lock(cmd.Context(), state)
			if errors.Is(err, supervisor.ErrUp) {
				return fmt.Errorf("%w: the host must be down; `foothold lab down --state %s` ends it", err, state.Dir)
			}
			if err != nil {
				return err
			}
			defer lock.Close()
			if c, err := client.Find(state.Context()); err == nil && cache == "" {
				cache = c.Cache
			}
			if cache == "" {
				if cache, err = defaultCache(); err != nil {
					return err
				}
			}
			return hostimage.Medium{CacheDir: cache, EFI: filepath.Join(args[0], bootimage.AuditFile), TPM: state.Provider("tpm"), Asset: ground.HostAsset,
				Console: cmd.OutOrStdout(), Progress: func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), text) }}.Boot(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&cache, "cache", "", "`FOLDER` of packages (default: the lab's, else ~/.cache/foothold/build)")
	return cmd
}

"""What a run tells: metrics, progress, reports of trees and branches, and a watchdog for stalls."""
